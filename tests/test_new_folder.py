"""A folder that appears whole: whoever is killed, at whatever moment, and whoever else writes it."""

import os
import shutil
import sys
import threading
from pathlib import Path

import pytest

from m3_conversion.original import ConversionError
from m3_conversion.writer import check_destination, new_folder


NEW, OLD = {"a.txt": "new", "b.txt": "new too"}, {"mine.txt": "old"}


def fill(folder: Path, content: dict[str, str]) -> None:
    for name, text in content.items():
        (folder / name).write_text(text)


def content(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.iterdir()}


def write(destination: Path) -> None:
    with new_folder(destination, overwrite=True) as folder:
        fill(folder, NEW)


def killed_at(event: int, destination: Path) -> bool:
    """Has a process write a folder that is killed before its n-th step in the file system. Whether it came to that."""
    child = os.fork()
    if child == 0:
        left = event

        def watch(name: str, arguments: tuple) -> None:
            nonlocal left
            if name.startswith(("open", "os.", "shutil.", "fcntl.")):
                left -= 1
                if left < 0:
                    os._exit(9)

        sys.addaudithook(watch)
        write(destination)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_killed_at_any_step_the_same_call_makes_the_same_folder(tmp_path):
    event, found = 0, []
    while True:
        destination = tmp_path / str(event) / "made"
        destination.mkdir(parents=True)
        fill(destination, OLD)
        if not killed_at(event, destination):
            break
        found.append(content(destination) if destination.exists() else None)
        if found[-1] is None:
            put_something_in_its_place(Path(shutil.copytree(destination.parent, tmp_path / f"{event} copied")) / "made")
        check_destination(destination, True)  # the beginning of the next run
        assert content(destination) == (found[-1] or OLD), event
        assert [file.name for file in destination.parent.iterdir()] == ["made"], event
        write(destination)
        assert content(destination) == NEW, event
        assert [file.name for file in destination.parent.iterdir()] == ["made"], event
        event += 1
    assert all(state in found for state in (OLD, NEW, None)) and all(state in (OLD, NEW, None) for state in found)
    assert event > 15


def put_something_in_its_place(destination: Path) -> None:
    """Where a run was killed between the two renames: what it was about to replace is not removed for what came since."""
    destination.mkdir()
    fill(destination, {"theirs.txt": "theirs"})
    with pytest.raises(ConversionError, match=r"replaced is what .*made was before"):
        write(destination)
    [replaced] = destination.parent.glob(".made.*/replaced")
    assert content(replaced) == OLD and content(destination) == {"theirs.txt": "theirs"}


def test_who_comes_second_says_so_and_changes_nothing(tmp_path):
    destination, outcomes = tmp_path / "made", []
    barrier = threading.Barrier(8)

    def race(number: int) -> None:
        barrier.wait()
        try:
            with new_folder(destination, overwrite=True) as folder:
                fill(folder, {f"{number}.txt": str(number), "both.txt": str(number)})
                barrier.wait(10)
        except ConversionError as error:
            outcomes.append(str(error))
            barrier.wait(10)
        else:
            outcomes.append(number)

    threads = [threading.Thread(target=race, args=(number,)) for number in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    refused = [outcome for outcome in outcomes if isinstance(outcome, str)]
    [winner] = [outcome for outcome in outcomes if isinstance(outcome, int)]
    assert len(refused) == 7
    assert all(str(destination) in outcome and "another process" in outcome for outcome in refused)
    assert content(destination) == {f"{winner}.txt": str(winner), "both.txt": str(winner)}
    assert [file.name for file in tmp_path.iterdir()] == ["made"]


def test_what_runs_is_not_removed(tmp_path):
    with new_folder(tmp_path / "made", overwrite=False) as folder:
        fill(folder, NEW)
        with pytest.raises(ConversionError, match=r"made is being written by another process"):
            check_destination(tmp_path / "made", False)
        write(tmp_path / "made.2")  # a name that begins alike
    assert content(tmp_path / "made") == NEW
    assert sorted(file.name for file in tmp_path.iterdir()) == ["made", "made.2"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_who_fails_leaves_what_was_there(error, tmp_path):
    destination = tmp_path / "made"
    destination.mkdir()
    fill(destination, OLD)
    with pytest.raises(error), new_folder(destination, overwrite=True) as folder:
        fill(folder, NEW)
        raise error
    assert content(destination) == OLD
    assert [file.name for file in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize("name", [".made.incomplete-m3", ".made.incomplete-01234567", ".made.replaced-01234567"])
def test_what_was_not_made_here_is_kept_and_named(name, tmp_path, caplog):
    (tmp_path / name / "new").mkdir(parents=True)
    (tmp_path / name / "new" / "mine.txt").write_text("mine")
    if name.endswith("m3"):
        with pytest.raises(ConversionError, match=r"\.made\.incomplete-m3 is in the way"):
            write(tmp_path / "made")
    else:
        write(tmp_path / "made")
        assert name in caplog.text
    assert content(tmp_path / name / "new") == {"mine.txt": "mine"}
