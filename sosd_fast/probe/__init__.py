"""The probe: when a step is over, what to measure then, measuring it, keeping what was found."""
