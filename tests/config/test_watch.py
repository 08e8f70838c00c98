"""Hot reload on real files. Every wait is for an event, with a time limit that only a failure reaches."""

from __future__ import annotations

import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scopestate import config
from scopestate.config import Config, ConfigWatcher
from scopestate.config.loader import Examined, examine_bytes
from scopestate.config.watch import watch_points
from scopestate.errors import ConfigError

LIMIT_S = 20.0


def text(number: int) -> str:
    return f"limits: {{scope_mailbox: {number}}}\n"


def write(path: Path, content: str) -> None:
    """Write a file at once. In place it is empty for a moment, which a slow machine may make long enough to be read."""
    other = path.with_name("other")
    other.write_text(content)
    os.replace(other, path)


class Watched:
    """A watcher whose callbacks fill one queue: `applied` numbers and `reported` errors, in order."""

    def __init__(
        self, path: Path, *, recheck_s: float = 600, running: Config | None = None, quiet_s: float = 0.05
    ) -> None:
        self.seen: queue.Queue[int | ConfigError] = queue.Queue()
        self.on_apply: Callable[[Config], None] = lambda _: None
        self.looks = threading.Semaphore(0)
        self.watcher = ConfigWatcher(
            path, self._apply, self._report, running=running, quiet_s=quiet_s, recheck_s=recheck_s
        )

        self._look = self.watcher._look
        self.watcher._look = self._look_and_tell  # type: ignore[method-assign]

    def _look_and_tell(self, *, last_try: bool) -> bool:
        done = self._look(last_try=last_try)
        self.looks.release()
        return done

    def looked(self) -> None:
        """Wait until the watcher has read the file once more, whatever came of it."""
        assert self.looks.acquire(timeout=LIMIT_S)

    def _apply(self, new: Config) -> None:
        self.seen.put(new.limits.scope_mailbox)
        self.on_apply(new)

    def _report(self, error: ConfigError) -> None:
        self.seen.put(error)

    def next(self) -> int | ConfigError:
        return self.seen.get(timeout=LIMIT_S)

    def error(self) -> ConfigError:
        found = self.next()
        assert isinstance(found, ConfigError)
        return found


@pytest.fixture
def watch() -> Iterator[Callable[..., Watched]]:
    """Start watching a path; at the end stop, and see that no thread is left."""
    before = set(threading.enumerate())
    started: list[Watched] = []

    def start(path: Path, **options: object) -> Watched:
        watched = Watched(path, **options)  # type: ignore[arg-type]
        watched.watcher.start()
        started.append(watched)
        return watched

    yield start
    for watched in started:
        watched.watcher.stop()
    assert set(threading.enumerate()) <= before
    assert [list(watched.seen.queue) for watched in started if watched.seen.queue] == []


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "conf" / "engine.yaml"
    path.parent.mkdir()
    path.write_text(text(1))
    return path


Watch = Callable[..., Watched]


class TestChanges:
    def test_rewritten_in_place(self, path: Path, watch: Watch) -> None:
        watched = watch(path)

        path.write_text(text(2))
        assert watched.next() == 2
        path.write_text(text(3))
        assert watched.next() == 3

    def test_replaced_by_rename_as_editors_do(self, path: Path, watch: Watch) -> None:
        watched = watch(path)

        for number in (2, 3):
            other = path.with_name(".engine.yaml.swp")
            other.write_text(text(number))
            os.replace(other, path)
            assert watched.next() == number

    def test_replaced_by_a_file_from_another_folder(self, path: Path, tmp_path: Path, watch: Watch) -> None:
        watched = watch(path)

        (tmp_path / "new.yaml").write_text(text(2))
        os.replace(tmp_path / "new.yaml", path)

        assert watched.next() == 2

    def test_moved_away_and_written_anew(self, path: Path, watch: Watch) -> None:
        watched = watch(path)

        path.rename(path.with_suffix(".bak"))
        path.write_text(text(2))

        assert watched.next() == 2

    def test_a_kubernetes_swap_of_the_data_link(self, path: Path, watch: Watch) -> None:
        home = path.parent
        path.unlink()
        for version in (1, 2, 3):
            (home / f"..v{version}").mkdir()
            (home / f"..v{version}" / "engine.yaml").write_text(text(version))
        (home / "..data").symlink_to("..v1")
        path.symlink_to("..data/engine.yaml")
        watched = watch(path)

        for version in (2, 3):
            (home / "..data_tmp").symlink_to(f"..v{version}")
            os.replace(home / "..data_tmp", home / "..data")
            (home / f"..v{version - 1}" / "engine.yaml").unlink()
            (home / f"..v{version - 1}").rmdir()
            assert watched.next() == version

    def test_a_chain_of_links_to_other_folders(self, path: Path, tmp_path: Path, watch: Watch) -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "real.yaml").write_text(text(4))
        (tmp_path / "a" / "link.yaml").symlink_to(path)
        (tmp_path / "outer.yaml").symlink_to(tmp_path / "a" / "link.yaml")
        watched = watch(tmp_path / "outer.yaml")

        path.write_text(text(2))  # the file at the end
        assert watched.next() == 2
        (tmp_path / "swap").symlink_to("../b/real.yaml")
        os.replace(tmp_path / "swap", tmp_path / "a" / "link.yaml")  # the link in the middle
        assert watched.next() == 4
        (tmp_path / "b" / "real.yaml").write_text(text(5))  # the file at the end of the new chain
        assert watched.next() == 5

    def test_deleted_and_created_again(self, path: Path, watch: Watch) -> None:
        watched = watch(path)

        path.unlink()
        error = watched.error()
        assert (error.problem, error.file) == ("there is no such file", str(path))
        path.write_text(text(2))
        assert watched.next() == 2

    def test_the_folder_deleted_and_created_again(self, path: Path, watch: Watch) -> None:
        watched = watch(path)

        path.unlink()
        path.parent.rmdir()
        assert watched.error().problem == "there is no such file"
        path.parent.mkdir()
        path.write_text(text(2))
        assert watched.next() == 2

    def test_the_folder_replaced_is_found_by_the_recheck(self, path: Path, tmp_path: Path, watch: Watch) -> None:
        watched = watch(path, recheck_s=0.05)

        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "engine.yaml").write_text(text(2))
        watched.on_apply = lambda _: setattr(watched.watcher, "_recheck_s", 600)
        path.parent.rename(tmp_path / "old")
        (tmp_path / "other").rename(path.parent)
        assert watched.next() == 2
        # From here on by events again, from the new folder.
        path.write_text(text(3))
        assert watched.next() == 3

    def test_a_file_that_does_not_exist_yet(self, tmp_path: Path, watch: Watch) -> None:
        watched = watch(tmp_path / "later" / "engine.yaml")

        (tmp_path / "later").mkdir()
        (tmp_path / "later" / "engine.yaml").write_text(text(2))

        assert watched.next() == 2

    def test_the_environment_is_read_at_each_reload(
        self, path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        watched = watch(path)

        monkeypatch.setenv("MAILBOX", "7")
        write(path, "limits: {scope_mailbox: ${MAILBOX}}\n")
        assert watched.next() == 7
        monkeypatch.setenv("MAILBOX", "8")
        write(path, "limits: {scope_mailbox: ${MAILBOX}} # again\n")
        assert watched.next() == 8


class TestWhatIsNoChange:
    def test_the_same_bytes_again(self, path: Path, watch: Watch) -> None:
        watched = watch(path)

        write(path, text(1))
        watched.looked()
        os.utime(path)
        watched.looked()
        write(path, text(2))

        assert watched.next() == 2

    def test_other_files_in_the_folder(self, path: Path, watch: Watch) -> None:
        from watchdog.events import FileModifiedEvent, FileMovedEvent

        watched = watch(path)
        before = watched.watcher._changes

        other = str(path.with_name("other.yaml"))
        watched.watcher._on_event(FileModifiedEvent(other))
        watched.watcher._on_event(FileMovedEvent(other, other + "2"))
        assert watched.watcher._changes == before
        watched.watcher._on_event(FileMovedEvent(other, str(path)))
        assert watched.watcher._changes == before + 1

    def test_its_own_reading(self, path: Path, watch: Watch) -> None:
        watched = watch(path, running=config.load(path))
        watched.looked()

        path.read_text()
        write(path, text(2))
        watched.looked()

        assert watched.next() == 2
        assert not watched.looks.acquire(blocking=False)

    def test_a_burst_of_writes_ends_with_the_last(self, path: Path, watch: Watch) -> None:
        watched = watch(path, quiet_s=0.1)

        for number in range(2, 500):
            write(path, text(number))

        while (latest := watched.next()) != 499:
            assert isinstance(latest, int)

    def test_a_file_that_is_written_without_a_pause_is_read_all_the_same(self, path: Path, watch: Watch) -> None:
        # The pause asked for is longer than any between two writes, so only the bound on waiting can end it.
        watched = watch(path, quiet_s=0.2)
        done = threading.Event()

        def scribble() -> None:
            number = 2
            while not done.is_set():
                write(path, text(number))
                number += 1
                done.wait(0.01)

        writer = threading.Thread(target=scribble)
        writer.start()
        try:
            assert isinstance(watched.next(), int)
        finally:
            done.set()
            writer.join()
        watched.watcher.stop()
        watched.seen.queue.clear()

    def test_a_file_that_is_wrong_while_it_is_written_without_a_pause_is_not_reported(
        self, path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Each reading finds it wrong, and the next change comes before the pause is over, also on a slow machine.
        watched = watch(path, quiet_s=LIMIT_S)
        look, looks = watched.watcher._look, 0

        def look_and_go_on_writing(*, last_try: bool) -> bool:
            nonlocal looks
            looks += 1
            if looks == 3:
                done.set()
                writer.join()
                path.write_text(text(2))
            return look(last_try=last_try)

        watched.watcher._look = look_and_go_on_writing  # type: ignore[method-assign]
        monkeypatch.setattr("scopestate.config.watch._MAX_QUIET_PERIODS", 0.3 / LIMIT_S)
        done = threading.Event()

        def scribble() -> None:
            while not done.wait(0.02):
                path.write_text("a: [")

        writer = threading.Thread(target=scribble)
        writer.start()
        try:
            assert watched.next() == 2
        finally:
            done.set()
            writer.join()

    def test_a_file_written_in_two_steps_is_read_when_it_is_whole(self, path: Path, watch: Watch) -> None:
        watched = watch(path, quiet_s=0.5)

        with path.open("w") as stream:  # truncated: an empty file is no configuration
            stream.flush()
            stream.write("limits: {scope_mail")
            stream.flush()
            stream.write("box: 2}\n")

        assert watched.next() == 2

    def test_a_half_written_file_is_given_another_quiet_period(
        self, path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # The second half is written at the moment when the first was read and found wrong.
        whole, original = threading.Event(), examine_bytes

        def read_then_finish(content: bytes, file: str) -> Examined:
            examined = original(content, file)
            if examined.errors and not whole.is_set():
                whole.set()
                path.write_text(text(2))
            return examined

        monkeypatch.setattr("scopestate.config.watch.examine_bytes", read_then_finish)
        watched = watch(path)

        path.write_text("limits: {scope_mail")

        assert watched.next() == 2
        assert whole.is_set()


class TestBadFiles:
    def test_a_bad_file_is_reported_once_and_a_good_one_applied(
        self, path: Path, watch: Watch, caplog: pytest.LogCaptureFixture
    ) -> None:
        watched = watch(path)

        write(path, "limits: {scope_mailbox: many}\n")
        error = watched.error()
        assert (error.file, error.line, error.key) == (str(path), 1, "limits.scope_mailbox")
        watched.looked()
        watched.looked()
        os.utime(path)  # the same bad content: no second report
        watched.looked()
        write(path, text(2))
        assert watched.next() == 2

        errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
        assert len(errors) == 1
        assert errors[0].startswith(f"{path}:1, key `limits.scope_mailbox`: expected a whole number")
        assert errors[0].endswith("found the string 'many'; the running configuration stays")

    def test_each_bad_content_is_reported(self, path: Path, watch: Watch) -> None:
        watched = watch(path)

        write(path, "a: [")
        assert "not valid YAML" in watched.error().problem
        write(path, "worker: []")
        assert watched.error().key == "worker"
        write(path, "")
        assert "is empty" in watched.error().problem

    def test_back_to_the_running_content_is_applied_again(self, path: Path, watch: Watch) -> None:
        watched = watch(path)

        write(path, "a: [")
        watched.error()
        write(path, text(1))

        assert watched.next() == 1

    def test_a_bad_file_at_the_start_is_reported_only_once_it_changes(self, path: Path, watch: Watch) -> None:
        write(path, "a: [")
        watched = watch(path)

        write(path, text(2))

        assert watched.next() == 2

    def test_an_apply_that_raises_is_reported_and_the_watcher_goes_on(
        self, path: Path, watch: Watch, caplog: pytest.LogCaptureFixture
    ) -> None:
        watched = watch(path)

        def refuse(_: Config) -> None:
            raise ValueError("no such luck")

        watched.on_apply = refuse
        write(path, text(2))
        assert watched.next() == 2
        error = watched.error()
        assert error.problem == "the new configuration could not be applied: ValueError('no such luck')"
        assert (error.file, type(error.__cause__)) == (str(path), ValueError)
        assert any(record.exc_info for record in caplog.records)

        def refuse_properly(_: Config) -> None:
            raise ConfigError("not live", key="adapter")

        watched.on_apply = refuse_properly
        write(path, text(3))
        assert watched.next() == 3
        assert watched.error().problem == "not live"

        watched.on_apply = lambda _: None
        write(path, text(4))
        assert watched.next() == 4

    def test_a_report_that_raises_does_not_end_the_watcher(self, path: Path, caplog: pytest.LogCaptureFixture) -> None:
        reported, applied = threading.Event(), threading.Event()

        def report(_: ConfigError) -> None:
            reported.set()
            raise ValueError("no such luck")

        watcher = ConfigWatcher(path, lambda _: applied.set(), report, quiet_s=0.02)
        watcher.start()
        try:
            write(path, "a: [")
            assert reported.wait(LIMIT_S)
            write(path, text(2))
            assert applied.wait(LIMIT_S)
        finally:
            watcher.stop()
        assert f"{path}: reporting the error above failed" in [record.getMessage() for record in caplog.records]


class TestRunning:
    def test_a_change_between_loading_and_starting_is_applied(self, path: Path, watch: Watch) -> None:
        running = config.load(path)
        write(path, text(2))

        watched = watch(path, running=running)

        assert watched.next() == 2
        write(path, text(1))
        assert watched.next() == 1

    def test_an_unchanged_file_is_not(self, path: Path, watch: Watch) -> None:
        watched = watch(path, running=config.load(path))
        watched.looked()

        write(path, text(2))

        assert watched.next() == 2

    def test_a_file_that_went_bad_before_the_start_is_reported(self, path: Path, watch: Watch) -> None:
        running = config.load(path)
        write(path, "a: [")

        watched = watch(path, running=running)

        assert "not valid YAML" in watched.error().problem
        write(path, text(1))
        assert watched.next() == 1


class TestStop:
    def test_nothing_is_called_after_it(self, path: Path, watch: Watch) -> None:
        watched = watch(path)

        write(path, text(2))
        watched.watcher.stop()
        watched.seen.queue.clear()
        write(path, text(3))
        other = watch(path)
        write(path, text(4))

        assert other.next() == 4
        assert watched.seen.empty()

    def test_it_waits_for_a_callback_and_may_be_repeated(self, path: Path, watch: Watch) -> None:
        watched = watch(path)
        inside, leave, left = threading.Event(), threading.Event(), threading.Event()

        def linger(_: Config) -> None:
            inside.set()
            assert leave.wait(LIMIT_S)
            left.set()

        watched.on_apply = linger
        write(path, text(2))
        assert inside.wait(LIMIT_S)
        stopper = threading.Thread(target=watched.watcher.stop)
        stopper.start()
        assert not left.is_set()
        leave.set()
        stopper.join(LIMIT_S)

        assert not stopper.is_alive()
        assert left.is_set()
        watched.watcher.stop()
        assert watched.next() == 2

    def test_from_within_apply(self, path: Path, watch: Watch) -> None:
        watched = watch(path)
        stopped = threading.Event()

        def stop(_: Config) -> None:
            watched.watcher.stop()
            write(path, text(3))
            stopped.set()

        watched.on_apply = stop
        write(path, text(2))
        assert stopped.wait(LIMIT_S)
        watched.watcher.stop()

        assert watched.next() == 2

    def test_nothing_is_reported_after_it_either(self, path: Path, watch: Watch) -> None:
        watched = watch(path)

        def stop_and_refuse(_: Config) -> None:
            watched.watcher.stop()
            raise ValueError("no such luck")

        watched.on_apply = stop_and_refuse
        write(path, text(2))

        assert watched.next() == 2

    @pytest.mark.parametrize("bad", [False, True])
    def test_while_it_waits_for_quiet(
        self, path: Path, watch: Watch, bad: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        watched = watch(path, quiet_s=0.02 if bad else 60)
        waiting = threading.Event()
        original_wait, original_load = ConfigWatcher._wait_for_quiet, examine_bytes

        def tell_then_wait(self: ConfigWatcher) -> bool:
            if not bad:
                waiting.set()
            return original_wait(self)

        def tell_then_load(content: bytes, file: str) -> Examined:
            watched.watcher._quiet_s = 60
            waiting.set()
            return original_load(content, file)

        monkeypatch.setattr(ConfigWatcher, "_wait_for_quiet", tell_then_wait)
        monkeypatch.setattr("scopestate.config.watch.examine_bytes", tell_then_load)
        write(path, "a: [" if bad else text(2))
        assert waiting.wait(LIMIT_S)

        watched.watcher.stop()  # the fixture sees that nothing was called, and pytest's own limit that it did not wait

    def test_while_the_last_file_is_read(self, path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
        watched = watch(path)
        reading, original = threading.Event(), examine_bytes

        def read_when_stopping(content: bytes, file: str) -> Examined:
            reading.set()
            with watched.watcher._changed:
                assert watched.watcher._changed.wait_for(lambda: watched.watcher._stopping, LIMIT_S)
            return original(content, file)

        monkeypatch.setattr("scopestate.config.watch.examine_bytes", read_when_stopping)
        write(path, text(2))
        assert reading.wait(LIMIT_S)

        watched.watcher.stop()

    def test_a_watcher_starts_once(self, path: Path, watch: Watch) -> None:
        watched = watch(path)

        with pytest.raises(RuntimeError, match="make a new one"):
            watched.watcher.start()
        watched.watcher.stop()
        with pytest.raises(RuntimeError, match="make a new one"):
            watched.watcher.start()

    def test_before_start(self, path: Path) -> None:
        watcher = ConfigWatcher(path, lambda _: None, lambda _: None)
        watcher.stop()

        with pytest.raises(RuntimeError, match="make a new one"):
            watcher.start()


class TestWithoutFileEvents:
    @pytest.mark.parametrize("fails_in", ["__init__", "start", "schedule"])
    def test_the_file_is_looked_at_instead(
        self, path: Path, watch: Watch, fails_in: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        from watchdog.observers import Observer

        def refuse(*_: object, **__: object) -> None:
            raise OSError(24, "inotify instance limit reached")

        monkeypatch.setattr(Observer, fails_in, refuse)
        watched = watch(path)

        assert (
            f"{path}: no file events ([Errno 24] inotify instance limit reached); "
            "looking at the file every second instead"
        ) in [record.getMessage() for record in caplog.records]
        write(path, text(2000))
        assert watched.next() == 2000

    def test_a_folder_that_cannot_be_watched_later_is_left_to_the_recheck(
        self, path: Path, tmp_path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from watchdog.observers import Observer

        watched = watch(path, recheck_s=0.05)

        def refuse(*_: object, **__: object) -> None:
            raise OSError(28, "inotify watch limit reached")

        monkeypatch.setattr(Observer, "schedule", refuse)
        target = tmp_path / "elsewhere"
        target.mkdir()
        (target / "real.yaml").write_text(text(2))
        (tmp_path / "link").symlink_to(target / "real.yaml")
        os.replace(tmp_path / "link", path)
        assert watched.next() == 2
        (target / "real.yaml").write_text(text(3333))
        assert watched.next() == 3333


class TestWatchPoints:
    def test_a_plain_file(self, path: Path) -> None:
        assert watch_points(str(path)) == {(str(path.parent), "engine.yaml")}

    def test_links_on_the_way(self, path: Path, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to("conf")
        (tmp_path / "conf" / "up").symlink_to("../link/engine.yaml")

        assert watch_points(str(tmp_path / "link" / "up")) == {
            (str(tmp_path), "link"),
            (str(tmp_path / "conf"), "up"),
            (str(tmp_path / "conf"), "engine.yaml"),
        }

    def test_what_does_not_exist_is_awaited_where_it_would_appear(self, tmp_path: Path) -> None:
        assert watch_points(str(tmp_path / "a" / "b" / "c.yaml")) == {(str(tmp_path), "a")}

    def test_a_dangling_link(self, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to("nowhere/file")

        assert watch_points(str(tmp_path / "link")) == {(str(tmp_path), "link"), (str(tmp_path), "nowhere")}

    def test_a_circle_of_links_ends(self, tmp_path: Path) -> None:
        (tmp_path / "a").symlink_to("b")
        (tmp_path / "b").symlink_to("a")

        assert watch_points(str(tmp_path / "a")) == {(str(tmp_path), "a"), (str(tmp_path), "b")}


def test_importing_the_package_loads_neither_watchdog_nor_yaml() -> None:
    code = "import sys, scopestate.config as c; print([m for m in ('watchdog', 'yaml') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
