import sysconfig
from pathlib import Path

import pytest
import torch

from training.data import batches, fixed_batches, load_text, validation_files


def draw(count, text, seed=0, batch_size=3, context=5):
    stream = batches(text, batch_size, context, torch.Generator().manual_seed(seed))
    return [next(stream) for _ in range(count)]


def folder(root, count=60):
    for i in range(count):
        (root / f"sub{i % 3}").mkdir(exist_ok=True)
        (root / f"sub{i % 3}" / f"{i}.txt").write_text(f"file number {i}\n")
    return root


TEXT = torch.arange(100, dtype=torch.uint8)


def test_default_is_the_standard_library():
    tokens = load_text()
    size = len(tokens.train) + len(tokens.val)
    assert 5e6 < size < 30e6
    assert 0.01 < len(tokens.val) / size < 0.12
    assert tokens.train.dtype is tokens.val.dtype is torch.uint8
    text = bytes(tokens.train.numpy()) + bytes(tokens.val.numpy())
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for name in ("argparse.py", "json/decoder.py", "asyncio/events.py"):
        assert (stdlib / name).read_bytes() in text
    assert b"import _testcapi" not in text  # what test folders are full of


def test_split_is_disjoint_by_file_and_complete(tmp_path):
    tokens = load_text(folder(tmp_path), val_fraction=0.2)
    train, val = (set(bytes(part.numpy()).split(b"\0")) - {b""} for part in (tokens.train, tokens.val))
    assert not train & val
    assert train | val == {f"file number {i}\n".encode() for i in range(60)}
    assert 3 <= len(val) <= 25


def test_split_is_deterministic_and_stays_when_files_are_added(tmp_path):
    names = [f"a/{i}.py" for i in range(2000)]
    first = validation_files(names, 0.05)
    assert first == validation_files(names[::-1], 0.05)
    assert 60 <= len(first) <= 140  # 100 ± 4 standard deviations of a fair draw
    assert validation_files(names[:1000], 0.05) == first & set(names[:1000])
    assert torch.equal(load_text(folder(tmp_path)).train, load_text(tmp_path).train)


def test_small_folder_still_has_validation(tmp_path):
    tokens = load_text(folder(tmp_path, 2))
    assert len(tokens.train) == len(tokens.val) == len("file number 0\n") + 1


def test_single_file_gives_its_end(tmp_path):
    file = tmp_path / "text"
    file.write_bytes(bytes(range(200)))
    tokens = load_text(file, val_fraction=0.1)
    assert tokens.train.tolist() == list(range(180)) and tokens.val.tolist() == list(range(180, 200))


def test_hidden_and_binary_files_are_skipped(tmp_path):
    folder(tmp_path)
    expected = load_text(tmp_path)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    (tmp_path / "weights.bin").write_bytes(b"ab\0cd")
    (tmp_path / "empty.txt").write_text("")
    assert torch.equal(load_text(tmp_path).train, expected.train)
    assert torch.equal(load_text(tmp_path).val, expected.val)


def test_batches_are_windows_with_the_next_token_as_target():
    for x, y in draw(20, TEXT):
        assert x.shape == y.shape == (3, 5) and x.dtype is y.dtype is torch.int64
        assert torch.equal(y, x + 1)  # TEXT counts up
        assert torch.equal(x, x[:, :1] + torch.arange(5))


def test_batches_reach_both_ends():
    starts = {int(row[0]) for x, _ in draw(2000, TEXT) for row in x}
    assert starts == set(range(95))


def test_batches_depend_on_the_seed_and_nothing_else():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = draw(4, TEXT)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, draw(4, TEXT), strict=True))
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(first, draw(4, TEXT, seed=1), strict=True))


def test_a_saved_generator_state_continues_exactly():
    generator = torch.Generator().manual_seed(0)
    stream = batches(TEXT, 3, 5, generator)
    for _ in range(4):
        next(stream)
    state = generator.get_state()
    expected = [next(stream) for _ in range(3)]
    resumed = torch.Generator()
    resumed.set_state(state)
    got = batches(TEXT, 3, 5, resumed)
    for x, y in expected:
        x2, y2 = next(got)
        assert torch.equal(x, x2) and torch.equal(y, y2)


def test_fixed_batches_are_fixed_spread_and_in_range():
    first, second = fixed_batches(TEXT, 4, 9, 6), fixed_batches(TEXT, 4, 9, 6)
    assert [len(x) for x, _ in first] == [4, 2]
    starts = torch.cat([x[:, 0] for x, _ in first])
    assert starts.tolist() == [0, 15, 30, 45, 60, 75]
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], a[0] + 1) for a, b in zip(first, second, strict=True))


def test_fixed_batches_take_what_there_is():
    assert sum(len(x) for x, _ in fixed_batches(TEXT, 4, 9, 1000)) == 11  # 99 targets hold 11 windows of 9
    assert sum(len(x) for x, _ in fixed_batches(TEXT[:10], 4, 9, 1000)) == 1


def test_errors(tmp_path):
    with pytest.raises(ValueError, match=r"load_text: expected a text file or a folder, got path='/no/such'\. Check"):
        load_text("/no/such")
    with pytest.raises(ValueError, match=r"expected a folder with at least two text files, got path=.* with 0\. Give"):
        load_text(tmp_path)
    (tmp_path / "only.txt").write_text("alone")
    with pytest.raises(ValueError, match=r"with 1\. Give one text file by its own path"):
        load_text(tmp_path)
    with pytest.raises(ValueError, match=r"batches: expected at least context \+ 1 = 101 tokens, got len.*=100\. Give"):
        batches(TEXT, 1, 100, torch.Generator())
    with pytest.raises(ValueError, match=r"fixed_batches: expected at least"):
        fixed_batches(TEXT[:5], 1, 5, 1)
