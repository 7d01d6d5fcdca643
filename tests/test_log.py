"""LOG.md: newest first, a verdict in each title, and an anchor that what cites it can rely on."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LOG = (ROOT / "LOG.md").read_text()
ROOMS = ("sosd_fast", "kernels", "bench", "training", "tests", "docs", "examples")


def anchors():
    return re.findall(r'^<a id="([\w-]+)"></a>$', LOG, re.M)


def cited():
    """(file, anchor) of each place that cites LOG.md in a source file; the anchor is empty where there is none.

    A link to the page as a whole, `(../LOG.md)`, and the name of the file, `"LOG.md"`, cite no entry.
    """
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*")):
            if path.suffix in (".py", ".hpp", ".cpp", ".md") and path != Path(__file__).resolve():
                for anchor in re.findall(r"LOG\.md(?![)\"])(?:#([\w-]+))?", path.read_text()):
                    yield path.relative_to(ROOT), anchor


def test_entries_are_dated_newest_first_and_say_their_verdict():
    titles = re.findall(r"^## (.*)$", LOG, re.M)
    dates = [title.split(" · ")[0] for title in titles]
    assert dates == sorted(dates, reverse=True) and all(re.fullmatch(r"\d{4}-\d\d-\d\d", date) for date in dates)
    assert not [title for title in titles if len(title.split(" · ")) != 3]


def test_every_entry_has_an_anchor_of_its_own():
    found = anchors()
    assert len(found) == len(set(found)) == len(re.findall(r'^<a id="[\w-]+"></a>\n\n## ', LOG, re.M))
    assert len(found) == len(re.findall(r"^## ", LOG, re.M))
    assert set(re.findall(r"\]\(#([\w-]+)\)", LOG)) <= set(found)


@pytest.mark.parametrize("room", ROOMS)
def test_what_cites_the_log_names_an_entry(room):
    known = set(anchors())
    wrong = [f"{path}: LOG.md#{anchor}" for path, anchor in cited() if path.parts[0] == room and anchor not in known]
    assert not wrong
