"""The scheduler and the pages, against a model that writes down what every page holds and checks whatever is read."""

import collections
import random
import subprocess
import sys

from ridgeline.decode.engine.pages import ABSENT, PagePool, ShardPages
from ridgeline.decode.engine.scheduler import Row, Scheduler

STOP = 0


def made(text):
    """What the pretended model says after a text."""
    return hash(tuple(text)) % 13


class Device:
    """Pages as a device would hold them: for each position the text up to it that was there when it was written."""

    def __init__(self, scheduler):
        self.scheduler = scheduler
        self.held = {}  # (shard, kind, page, offset) -> text
        self.texts = {}

    def run(self, step):
        """Each row's new tokens, which the host gets to see a step later."""
        results = []
        for row in step.decode:
            text, tokens = self.texts[row.index], []
            for _ in range(step.steps):
                if len(text) < row.max_length:
                    self.write(row, len(text) - 1, len(text))
                    text.append(made(text))
                tokens.append(text[-1])  # what a full row makes is junk
            results.append((row, tokens[: row.max_length - len(text) + step.steps]))
        for batch in step.prefills:
            pending = [self.write(chunk.row, chunk.start, chunk.start + chunk.count, check=False) for chunk in batch]
            for reads in pending:  # all of a batch is written at once: no row may need what another of it writes
                self.check(*reads)
            for chunk in batch:
                if chunk.last:
                    text = self.texts[chunk.row.index] = list(chunk.row.tokens)
                    text.append(made(text))
                    results.append((chunk.row, [text[-1]]))
        return results

    def write(self, row, start, end, check=True):
        text = row.tokens if end <= len(row.tokens) else self.texts[row.index]
        before = dict(self.held) if not check else self.held
        size, shard = self.scheduler.page_size, self.scheduler.shard_of(row)
        places = []
        for kind, pages in enumerate(row.pages.lists):
            for position in range(start, end):
                page = pages[position // size]
                assert page != ABSENT
                self.held[shard, kind, page, position % size] = tuple(text[: position + 1])
                places.append((kind, position))
        reads = row, start, end, text, before if not check else self.held
        if check:
            self.check(*reads)
        return reads

    def check(self, row, start, end, text, before):
        """The first and the last new token see all that they should, of earlier programs or of the row itself."""
        size, shard = self.scheduler.page_size, self.scheduler.shard_of(row)
        for kind, (window, pages) in enumerate(zip(self.scheduler.shards[0].windows, row.pages.lists, strict=True)):
            for query in {start, end - 1}:
                first = 0 if window is None else max(0, query - window + 1)
                for position in range(first, query + 1):
                    held = before if position < start else self.held
                    there = held.get((shard, kind, pages[position // size], position % size))
                    assert there == tuple(text[: position + 1]), (row.index, kind, position)


def check_pages(scheduler):
    """Every page is free, or held by exactly the rows that list it."""
    for shard, pages in enumerate(scheduler.shards):
        rows = [row for row in scheduler.running if scheduler.shard_of(row) == shard]
        for kind, pool in enumerate(pages.pools):
            holders = collections.Counter(p for row in rows for p in row.pages.lists[kind] if p != ABSENT)
            assert set(holders).isdisjoint(pool._free)
            assert len(holders) + pool.free == pool.size
            assert all(pool._holders[page] == holders[page] for page in pool._holders)
            assert {pool._pages[key]: key for key in pool._pages} == pool._keys
    slots = [row.slot for row in scheduler.running]
    assert len(set(slots)) == len(slots)
    assert None not in slots


def make_scheduler(rng, windows, shards):
    size, counts = rng.choice((2, 4)), [rng.randint(8, 30) for _ in windows]
    pools = [
        ShardPages(windows, [PagePool(range(n * count, (n + 1) * count)) for count in counts], size)
        for n in range(shards)
    ]
    return Scheduler(pools, shards * rng.randint(1, 3), rng.choice((16, 32, 64)), prefix_caching=rng.random() < 0.9)


def play(seed):
    rng = random.Random(seed)
    scheduler = make_scheduler(rng, rng.choice(((None,), (None, 5), (3,))), rng.choice((1, 1, 2)))
    device, requests, in_flight = Device(scheduler), {}, []
    shared = [rng.randint(1, 12) for _ in range(20)]
    to_come = rng.randint(1, 6)
    for _ in range(10_000):
        while to_come and rng.random() < 0.5:
            prompt = shared[: rng.randint(0, 20)] + [rng.randint(1, 12) for _ in range(rng.randint(1, 20))]
            row = Row(to_come, prompt, len(prompt), len(prompt) + rng.randint(1, 25), rng.choice((0, 0, 1)))
            to_come -= 1
            if scheduler.fits(row.max_length):
                requests[row.index] = row
                scheduler.add(row)
        if rng.random() < 0.05 and requests:
            scheduler.remove(requests.pop(rng.choice(list(requests))))
        results = device.run(scheduler.schedule())
        check_pages(scheduler)
        for row, tokens in in_flight:
            if row.done:
                continue
            tokens = tokens[: row.max_length - len(row.tokens)]
            if STOP in tokens:
                tokens = tokens[: tokens.index(STOP) + 1]
            scheduler.advance(row, tokens)
            assert tokens
            if STOP in tokens or len(row.tokens) == row.max_length:
                scheduler.remove(requests.pop(row.index))
                text = row.tokens[: row.prompt_tokens]
                while len(text) < row.max_length and (len(text) == row.prompt_tokens or text[-1] != STOP):
                    text.append(made(text))
                assert row.tokens == text  # what it would have said alone
        in_flight = results
        if not requests and not to_come and not in_flight:
            break
    assert not requests, "somebody waits for ever"
    assert not scheduler.running + scheduler.waiting
    assert all(pool.free == pool.size for pages in scheduler.shards for pool in pages.pools)
    return scheduler.preemptions, scheduler.found_tokens


def test_10_000_random_schedules():
    """In a process of its own, where no types are checked."""
    run = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-3000:]


if __name__ == "__main__":
    played = [play(seed) for seed in range(10_000)]
    assert sum(preempted > 0 for preempted, _ in played) > 500
    assert sum(found > 0 for _, found in played) > 1000
