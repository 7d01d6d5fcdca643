"""Records of a run: written, read, searched for phases, drawn, reported."""
