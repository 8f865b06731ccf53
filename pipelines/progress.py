"""Progress of a run: a bar on a terminal, a log line now and then elsewhere.

The workers of the local runner are threads of the launcher's process, so they report straight to
it. In another process nobody has opened a progress, and reports go nowhere: there the launcher watches which files
are there by now.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from tqdm import tqdm

from schemas.samples import ShardRef

logger = logging.getLogger(__name__)
LOG_INTERVAL_SEC = 10.0
_WATCH_SEC = 2.0
_MAX_SHARE_OF_WATCHING = 0.05

_open: dict[str, Progress] = {}


class Progress:
    """Counts images of one run, and estimates how many there are.

    Single files are counted beforehand. How many images a shard holds is known only once it is
    read, so their number is estimated from the bytes read so far.
    """

    def __init__(
        self, run_id: str, shards: Sequence[ShardRef], on_terminal: bool | None = None, title: str = "build"
    ) -> None:
        self.run_id = run_id
        self._files = sum(len(shard.files) for shard in shards)
        self._bytes = sum(shard.num_bytes for shard in shards if shard.format != "files")
        self._shards = len(shards)
        self._shards_done = 0
        self._files_done = 0
        self._shard_images = 0
        self._shard_bytes = 0
        self._reported: dict[str, tuple[int, int]] = {}  # (images, bytes) of shards at work
        self._lock = threading.Lock()
        self._started = self._logged = time.monotonic()
        on_terminal = sys.stderr.isatty() if on_terminal is None else on_terminal
        self._bar = (
            tqdm(unit="image", unit_scale=False, smoothing=0.05, dynamic_ncols=True, desc=title)
            if on_terminal
            else None
        )

    def __enter__(self) -> Progress:
        _open[self.run_id] = self
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        del _open[self.run_id]
        if self._bar is not None:
            if kind is None:
                self._bar.total = self._bar.n  # the estimate may have been a little off
            self._bar.close()

    def advance(self, shard: ShardRef, images: int, num_bytes: int) -> None:
        with self._lock:
            reported_images, reported_bytes = self._reported.get(shard.shard_id, (0, 0))
            self._reported[shard.shard_id] = (reported_images + images, reported_bytes + num_bytes)
            self._count(shard, images, num_bytes)

    def finish(self, shard: ShardRef, num_images: int) -> None:
        """Books what was not reported batch by batch: headers and metadata, or a shard that an
        earlier run had finished."""
        with self._lock:
            self._shards_done += 1
            images, num_bytes = self._reported.pop(shard.shard_id, (0, 0))
            self._count(shard, max(num_images - images, 0), max(shard.num_bytes - num_bytes, 0))

    @property
    def done(self) -> int:
        return self._files_done + self._shard_images

    @property
    def expected(self) -> int | None:
        """Images expected in all; None before there is anything to estimate from."""
        if not self._bytes:
            return self._files
        if not self._shard_bytes:
            return None
        return max(self.done, self._files + round(self._shard_images * self._bytes / self._shard_bytes))

    def _count(self, shard: ShardRef, images: int, num_bytes: int) -> None:
        if shard.format == "files":
            self._files_done += images
        else:
            self._shard_images += images
            self._shard_bytes += num_bytes
        self._show(images)

    def _show(self, images: int) -> None:
        if self._bar is not None:
            self._bar.total = self.expected
            self._bar.set_postfix_str(f"shards {self._shards_done}/{self._shards}", refresh=False)
            self._bar.update(images)
            return
        now = time.monotonic()
        if now - self._logged < LOG_INTERVAL_SEC:
            return
        self._logged = now
        rate = self.done / max(now - self._started, 1e-6)
        expected = self.expected
        left = "unknown" if expected is None else f"{max(expected - self.done, 0) / max(rate, 1e-6):.0f} s"
        logger.info(
            "%d of about %s images, %.1f images/s, shards %d/%d, time left %s",
            self.done, expected if expected is not None else "?", rate, self._shards_done, self._shards, left,
        )  # fmt: skip


def report(run_id: str, shard: ShardRef, images: int, num_bytes: int) -> None:
    """Reports images of a shard to the run's progress, if it was opened in this process."""
    if progress := _open.get(run_id):
        progress.advance(shard, images, num_bytes)


def report_finished(run_id: str, shard: ShardRef, num_images: int) -> None:
    """Reports that a shard is done, with the images it holds."""
    if progress := _open.get(run_id):
        progress.finish(shard, num_images)


@contextmanager
def counting(title: str, total: int, unit: str = "image") -> Iterator[Callable[[int], None]]:
    """Shows how far something is of which the amount is known; yields what is called with each further amount.

    Args:
        unit: `image`, say; of bytes, `B`.
    """
    started = logged = time.monotonic()
    lock = threading.Lock()
    is_scaled = unit == "B"
    with tqdm(
        total=total, unit=unit, unit_scale=is_scaled, desc=title, disable=not sys.stderr.isatty(), leave=False
    ) as bar:
        done = 0

        def advance(amount: int) -> None:
            nonlocal done, logged
            with lock:
                done += amount
                bar.update(amount)
                now = time.monotonic()
                if not bar.disable or now - logged < LOG_INTERVAL_SEC:
                    return
                logged = now
                rate = done / (now - started)
                scale, name = (1e6, "MB") if is_scaled else (1, f"{unit}s")
                logger.info(
                    "%s: %.0f of %.0f %s, %.3g %s/s, time left %s",
                    title, done / scale, total / scale, name, rate / scale, name,
                    f"{(total - done) / rate:.0f} s" if done else "unknown",
                )  # fmt: skip

        yield advance


@contextmanager
def watching(
    title: str, amounts: Mapping[str, int], list_names: Callable[[], Collection[str]], unit: str = "image"
) -> Iterator[None]:
    """Shows how far work is by the files that it has written: on every runner, and in other processes too.

    Args:
        amounts: What each file, by its name, counts for.
        list_names: Gives the names that are there; where storage fails, it is asked again later.
    """
    stopped = threading.Event()
    with counting(title, sum(amounts.values()), unit) as advance:

        def watch() -> None:
            left = set(amounts)
            pause = _WATCH_SEC
            while not stopped.wait(pause):
                started = time.monotonic()
                done: set[str] = set()
                with suppress(OSError):  # nothing is there yet, or storage fails, of which the work itself will tell
                    done = left.intersection(list_names())
                left -= done
                advance(sum(amounts[name] for name in done))
                if not left:
                    logger.info("%s: all is computed, and is being published", title)
                    return
                pause = max(_WATCH_SEC, (time.monotonic() - started) / _MAX_SHARE_OF_WATCHING)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            stopped.set()
            watcher.join()
