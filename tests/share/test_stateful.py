"""A remote against a plain dictionary: push, pull, grow, rm, gc and time in any order.

The model knows which contents each name has, and when each object was written and each version dropped. After every
step the remote holds exactly what the model says must be there, and gc took what the model says must be gone.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kdcache.cache.manifest import read_manifest
from kdcache.cache.selection import Selection
from kdcache.cache.verify import verify
from kdcache.errors import MismatchError
from kdcache.share import keys as layout
from kdcache.share.gc import GRACE, collect, remove
from kdcache.share.pull import pull
from kdcache.share.push import push
from kdcache.share.refs import history, live
from kdcache.testing.caches import dump, made_plan
from tests.share.conftest import MEMORY
from tests.share.worlds import DAY, World, broken_refs

NAMES = st.sampled_from(["sst2", "mind"])
# Each is the one before, extended by a teacher or by texts; the last has nothing in common with them.
PLANS = [
    made_plan(3, 0, ["bert"]),
    made_plan(3, 0, ["bert", "roberta"]),
    made_plan(4, 0, ["bert", "roberta"]),
    made_plan(2, 2, ["xlm"]),
]
CONTENTS = st.integers(0, len(PLANS) - 1)


@dataclass
class Version:
    """A published version in the model."""

    content: int
    dropped: float | None = None


@dataclass
class Model:
    """Names with their versions, by number; tombstones have content -1."""

    names: dict[str, dict[int, Version]] = field(default_factory=lambda: {"sst2": {}, "mind": {}})

    def live(self, name: str) -> dict[int, int]:
        return {
            number: one.content for number, one in self.names[name].items() if one.dropped is None and one.content >= 0
        }

    def newest(self, name: str) -> tuple[int, int] | None:
        found = self.live(name)
        return (max(found), found[max(found)]) if found else None


class Sharing(RuleBasedStateMachine):
    """Every rule does the same to the remote and to the model."""

    keys: list[set[str]]  # of the objects of each content

    @initialize()
    def begin(self) -> None:
        self.directory = Path(tempfile.mkdtemp(dir=MEMORY, prefix="kdcache-test-"))
        self.world, self.model = World(), Model()
        self.written: dict[str, float] = {}
        self.caches = [_cache(number) for number in range(len(PLANS))]
        self.keys = [_keys(path) for path in self.caches]

    @rule(name=NAMES, content=CONTENTS)
    def push(self, name: str, content: int) -> None:
        there = {key for key in self.world.remote.objects if key.startswith(("files/", "manifests/"))}
        report = push(self.world.remote, self.caches[content], name, timing=self.world.timing, workers=1)
        versions, newest = self.model.names[name], self.model.newest(name)
        same = newest is not None and newest[1] == content and newest[0] == max(versions)
        number = max(versions, default=0) + (0 if same else 1)
        assert report.reference == f"{name}@{number}"
        assert report.new_version is not same
        assert report.files_sent == len(self.keys[content] - there)
        versions.setdefault(number, Version(content))
        self.written |= dict.fromkeys(self.keys[content] - there, self.world.seconds)

    @rule(name=NAMES, part=st.sampled_from([None, Selection({}), Selection(None, text=False)]))
    def pull(self, name: str, part: Selection | None) -> None:
        target, newest = self.directory / "pulled", self.model.newest(name)
        try:
            report = pull(self.world.remote, name, target, part, workers=1)
        except MismatchError:
            assert newest is None
            return
        assert newest is not None
        assert report.identity == read_manifest(self.caches[newest[1]]).identity
        assert verify(target) == []
        shutil.rmtree(target)

    @rule(name=NAMES, data=st.data())
    def drop(self, name: str, data: st.DataObject) -> None:
        found = self.model.live(name)
        if not found:
            return
        number = data.draw(st.sampled_from([None, *found]))
        remove(self.world.remote, name if number is None else f"{name}@{number}")
        versions = self.model.names[name]
        for one in found if number is None else [number]:
            versions[one].dropped = self.world.seconds
        versions[max(versions) + 1] = Version(-1)

    @rule(days=st.sampled_from([0.01, 3.0, 5.0, 8.0]))
    def wait(self, days: float) -> None:
        self.world.seconds += days * DAY

    @rule(dry=st.booleans())
    def gc(self, dry: bool) -> None:
        now = self.world.seconds
        reached = self._reached(now)
        report = collect(self.world.remote, delete=not dry, timing=self.world.timing, workers=1)
        expected = {key for key, at in self.written.items() if key not in reached and now - at > GRACE}
        assert {key for key in report.keys if not key.startswith("refs/")} == expected
        if not dry:
            for key in expected:
                del self.written[key]

    @precondition(lambda self: hasattr(self, "world"))
    @invariant()
    def the_remote_is_what_the_model_says(self) -> None:
        there = {key for key in self.world.remote.objects if not key.startswith("refs/")}
        assert there == self.written.keys()
        for name in self.model.names:
            found = {ref.number: ref.identity for ref in live(history(self.world.remote, name))}
            assert found == {
                number: read_manifest(self.caches[one]).identity for number, one in self.model.live(name).items()
            }
        assert broken_refs(self.world.remote) == []

    def teardown(self) -> None:
        if hasattr(self, "directory"):
            shutil.rmtree(self.directory)

    def _reached(self, now: float) -> set[str]:
        """Objects of versions that live, or that were dropped within the grace period, or that are the newest number of
        a name.
        """
        kept = [
            one.content
            for versions in self.model.names.values()
            for one in versions.values()
            if one.content >= 0 and (one.dropped is None or now - one.dropped <= GRACE)
        ]
        return set().union(*(self.keys[content] for content in kept))


_made: dict[int, Path] = {}


def _cache(number: int) -> Path:
    if number not in _made:
        _made[number] = Path(tempfile.mkdtemp(dir=MEMORY, prefix="kdcache-test-")) / "cache"
        dump(_made[number], PLANS[number])
    return _made[number]


def _keys(path: Path) -> set[str]:
    import hashlib

    manifest = (path / "manifest.json").read_bytes()
    files = read_manifest(path).contents.files.values()
    return {layout.file_key(digest.sha256) for digest in files} | {
        layout.manifest_key(hashlib.sha256(manifest).hexdigest())
    }


def teardown_module() -> None:
    for path in _made.values():
        shutil.rmtree(path.parent)


Sharing.TestCase.settings = settings(max_examples=40, stateful_step_count=20)
TestSharing = Sharing.TestCase
