"""The artifacts and how they hang together: up to the data, down to what is served.

    manifests -> Lineage -> tree() of parents or of children

A folder that was cleared away stays in the tree by the name that its children know.

Ring: pure.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]  # Any: manifests' values
ORDER = ("dataset", "corpus", "base", "pretrained", "packed", "adapter", "merged", "published", "served")
_CHECKS = ("health", "evaluation", "decision")


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One artifact. `fields` is what Prefect carries of it; a cleared one has only its name."""

    ref: str
    folder: str = ""
    parents: tuple[str, ...] = ()
    created_at: str = ""
    fields: Json = field(default_factory=dict[str, Any])
    about: Json = field(default_factory=dict[str, Any])
    spec: Json = field(default_factory=dict[str, Any])

    @property
    def kind(self) -> str:
        """The folder's name below the store's root."""
        return self.ref.partition("/")[0]

    @property
    def is_cleared(self) -> bool:
        """Whether only its children know it."""
        return not self.folder

    @property
    def is_check(self) -> bool:
        """Whether it says something of a model and is no step towards one."""
        return self.kind in _CHECKS


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """A node and what hangs below it. `is_repeated`: shown above already, so without its own branches."""

    node: Node
    branches: tuple["Branch", ...] = ()
    is_repeated: bool = False

    def walk(self) -> Iterator[Node]:
        """Yield each node once, this one first."""
        if not self.is_repeated:
            yield self.node
            for branch in self.branches:
                yield from branch.walk()


class Lineage:
    """All artifacts of a store. Cost: linear in their number and links."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self.nodes = {node.ref: node for node in nodes}
        self._children: dict[str, list[str]] = {}
        for node in sorted(self.nodes.values(), key=lambda node: (node.created_at, node.ref)):
            for parent in dict.fromkeys(node.parents):
                self._children.setdefault(parent, []).append(node.ref)

    def get(self, ref: str) -> Node:
        """Return an artifact, or a cleared one of that name."""
        return self.nodes.get(ref) or Node(ref=ref)

    def of_kind(self, *kinds: str) -> list[Node]:
        """Return the artifacts of some kinds, oldest first."""
        found = [node for node in self.nodes.values() if node.kind in kinds]
        return sorted(found, key=lambda node: (node.created_at, node.ref))

    def children(self, ref: str) -> list[Node]:
        """Return what was made of an artifact, oldest first."""
        return [self.nodes[child] for child in self._children.get(ref, ())]

    def up(self, ref: str) -> Branch:
        """Return the tree of what an artifact was made of."""
        return self._tree(ref, lambda node: list(node.parents), set())

    def down(self, ref: str) -> Branch:
        """Return the tree of what was made of an artifact."""
        return self._tree(ref, lambda node: self._children.get(node.ref, []), set())

    def _tree(self, ref: str, after: Callable[[Node], list[str]], seen: set[str]) -> Branch:
        node = self.get(ref)
        if ref in seen:
            return Branch(node=node, is_repeated=True)
        seen.add(ref)
        return Branch(node=node, branches=tuple(self._tree(other, after, seen) for other in dict.fromkeys(after(node))))

    def named(self, text: str) -> list[Node]:
        """Return the artifacts that `text` names: `kind/key`, first digits of a key (8 or more), a digest or commit."""
        kind, slash, key = text.partition("/")
        if slash and kind in {node.kind for node in self.nodes.values()}:
            return [node for node in self.of_kind(kind) if key and node.ref.startswith(text)]
        if len(text) < 8:
            return []
        by_key = [node for node in self.nodes.values() if node.ref.partition("/")[2].startswith(text)]
        return by_key or self.with_digest(text)

    def with_digest(self, digest: str) -> list[Node]:
        """Return the steps whose own digest or commit begins with `digest`, the latest step first."""
        found = [
            node
            for node in self.nodes.values()
            if not node.is_check and any(own.startswith(digest) for own in _digests(node))
        ]
        return sorted(found, key=_lateness)


def _digests(node: Node) -> list[str]:
    return [str(node.fields[name]) for name in ("model_digest", "adapter_digest", "commit") if node.fields.get(name)]


def _lateness(node: Node) -> int:
    return -ORDER.index(node.kind) if node.kind in ORDER else 1
