"""Trees over any set of artifacts: every link is walked once, whatever is missing."""

from hypothesis import given
from hypothesis import strategies as st

from deployments.provenance.lineage import ORDER, Branch, Lineage, Node
from deployments.provenance.say import tree_lines


@st.composite
def stores(draw: st.DrawFn) -> dict[str, Node]:
    """Artifacts whose parents are earlier ones, or cleared ones."""
    nodes: dict[str, Node] = {}
    for number in range(draw(st.integers(0, 12))):
        known = [*nodes, "gone/0", "gone/1"]
        parents = tuple(draw(st.lists(st.sampled_from(known), max_size=3)))
        ref = f"{draw(st.sampled_from(ORDER))}/{number}"
        nodes[ref] = Node(ref=ref, folder="/x", parents=parents, created_at=f"{draw(st.integers(0, 3))}")
    return nodes


def _reach(start: str, after: dict[str, set[str]]) -> set[str]:
    seen, todo = set[str](), [start]
    while todo:
        ref = todo.pop()
        if ref not in seen:
            seen.add(ref)
            todo += after.get(ref, ())
    return seen


def _count(branch: Branch) -> list[str]:
    return [branch.node.ref, *[ref for below in branch.branches for ref in _count(below)]]


@given(stores())
def test_up_and_down_reach_what_the_links_reach_and_each_once(nodes: dict[str, Node]):
    lineage = Lineage(nodes.values())
    above = {ref: set(node.parents) for ref, node in nodes.items()}
    below: dict[str, set[str]] = {}
    for ref, parents in above.items():
        for parent in parents:
            below.setdefault(parent, set()).add(ref)
    for ref in [*nodes, "gone/0"]:
        up, down = [node.ref for node in lineage.up(ref).walk()], [node.ref for node in lineage.down(ref).walk()]
        assert sorted(up) == sorted(_reach(ref, above)) and sorted(down) == sorted(_reach(ref, below))
        for other in up:  # the two directions are each other's mirror
            assert ref in {node.ref for node in lineage.down(other).walk()}


@given(stores())
def test_a_line_is_printed_for_each_branch(nodes: dict[str, Node]):
    lineage = Lineage({ref: Node(ref=f"x{ref}", parents=node.parents) for ref, node in nodes.items()}.values())
    for ref in lineage.nodes:
        branch = lineage.up(ref)
        assert len(tree_lines(branch, lambda node: [])) == len(_count(branch))


def test_an_artifact_is_named_by_ref_key_digest_or_commit():
    merged = Node(ref="merged/" + "a" * 64, folder="/x", fields={"model_digest": "d" * 64})
    published = Node(ref="published/" + "b" * 64, folder="/x", fields={"model_digest": "d" * 64, "commit": "c" * 40})
    health = Node(ref="health/" + "e" * 64, folder="/x", parents=(published.ref,))
    lineage = Lineage([merged, published, health])
    assert lineage.named("merged/aaaa") == lineage.named("a" * 8) == [merged]
    assert lineage.named("d" * 12) == [published, merged]  # the latest step first: the other is among its parents
    assert lineage.named("c" * 10) == [published]
    assert lineage.named("a" * 7) == lineage.named("merged/") == lineage.named("f" * 64) == []
    assert lineage.children(published.ref) == [health] and health.is_check
