"""What is kept of texts that were seen before, so that others with the same beginning need not run.

A :class:`Node` is one page's worth of tokens after a given beginning. Nodes form a tree; a path
from its root spells a text, and the pages of a node hold what its tokens left behind in every
stage. Routes are causal: equal beginnings have equal routes. But how many of a node's tokens ran a
depth differs from node to node, so at every depth the entries of a beginning may end within a page.
A node keeps that page too; who goes on from there gets a copy of it.

There is no hash to collide: children are looked up by their tokens. Where a prompt carries an
embedding, a digest of its bytes stands in the place of the token.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from mor.engine.pages import PagePool, PageTables

Columns = tuple[int, list[list[int]]]
"""The first column of a table row that a node keeps, and the pages by column and layer."""


@dataclass(eq=False)
class Node:
    """One page's worth of tokens.

    Attributes:
        parent: what comes before; None for the root.
        key: what its parent calls it: its own tokens.
        depths: recursions that each of them ran.
        ends: entries up to its end of each table row: the private one, then one per depth.
        columns: what it keeps of each of these rows.
        children: what has come after, by key.
        alive: whether it is still in the tree.
    """

    parent: Node | None
    key: Hashable
    depths: tuple[int, ...]
    ends: tuple[int, ...]
    columns: tuple[Columns, ...] = ()
    children: dict[Hashable, Node] = field(default_factory=dict)
    alive: bool = True

    @property
    def length(self) -> int:
        """Tokens up to its end."""
        return self.ends[0]

    def pages(self) -> list[int]:
        """All pages that it keeps."""
        return [page for _, kept in self.columns for column in kept for page in column]

    def since(self, start: Node) -> list[Node]:
        """The path from ``start`` (left out), an ancestor or itself, down to here."""
        path: list[Node] = []
        node = self
        while node is not start:
            path.append(node)
            assert node.parent is not None
            node = node.parent
        return path[::-1]


class PrefixTree:
    """The nodes, and which of them goes first when pages are wanted.

    Args:
        pool: whose pages are kept.
        private, block: the tables into it.
        depths: rows of ``block`` per request, one for each depth.
        ends: whether one more row holds all tokens, as they ended.

    Attributes:
        root: the empty text.
    """

    def __init__(
        self, pool: PagePool, private: PageTables, block: PageTables, depths: int, ends: bool
    ) -> None:
        self.pool, self.private, self.block = pool, private, block
        self.depths, self.ends, self.groups = depths, ends, depths + ends
        pool.evict = self.evict
        self.root = Node(None, None, (), (0,) * (1 + self.groups))
        # Longest unused first. A node stands before its ancestors, so the first one is a leaf.
        self._order: OrderedDict[Node, None] = OrderedDict()

    def __len__(self) -> int:
        """How many nodes there are."""
        return len(self._order)

    def key(self, node: Node, tokens: Sequence[Hashable], salt: Hashable) -> Hashable:
        """What ``node`` calls the page of ``tokens`` that follows it; None where they are too few.

        Args:
            node: where they are.
            tokens: from the beginning.
            salt: whatever makes equal tokens leave other entries.
        """
        block = tuple(tokens[node.length : node.length + self.pool.page_size])
        if len(block) < self.pool.page_size:
            return None
        return block if node.parent is not None else (salt, block)

    def walk(self, node: Node, tokens: Sequence[Hashable], salt: Hashable) -> Node:
        """The node farthest below ``node`` on the way that ``tokens`` go."""
        while (child := node.children.get(self.key(node, tokens, salt))) is not None:
            node = child
        return node

    def learn(
        self,
        node: Node,
        tokens: Sequence[Hashable],
        depths: Sequence[int],
        salt: Hashable,
        row: int,
    ) -> Node:
        """Keep what is below ``node`` of a resident request's tokens, as far as ``depths`` go.

        Args:
            node: on the way of the request.
            tokens: of the request, through with all stages.
            depths: recursions that each of them ran.
            salt: as of :meth:`key`.
            row: the request's.

        Returns:
            The last node on its way.
        """
        while (key := self.key(node, tokens, salt)) is not None:
            block = slice(node.length, node.length + self.pool.page_size)
            ran = tuple(depths[block])
            child = node.children.get(key)
            if child is None:
                child = self._add(node, key, ran, row)
            elif child.depths != ran:
                break  # a near-tie fell otherwise, where a batch's shape moves the last bits
            node = child
        self.touch(node)
        # Tokens that ran nothing, in a model without private layers, keep no page.
        while len(self) > self.pool.num_pages:
            self._remove(next(iter(self._order)))
        return node

    def count_entries(self, depths: Sequence[int]) -> list[int]:
        """Entries of tokens that ran ``depths``, in each row of the block."""
        counts = [sum(ran > depth for ran in depths) for depth in range(self.depths)]
        return [*counts, len(depths)] if self.ends else counts

    def _add(self, parent: Node, key: Hashable, depths: tuple[int, ...], row: int) -> Node:
        size = self.pool.page_size
        new = [size, *self.count_entries(depths)]
        ends = tuple(before + more for before, more in zip(parent.ends, new, strict=True))
        columns: list[Columns] = []
        for (table, own), before, end in zip(self.rows(row), parent.ends, ends, strict=True):
            columns.append((before // size, table.pages(own, before // size, -(-end // size))))
        node = Node(parent, key, depths, ends, tuple(columns))
        self.pool.keep(node.pages())
        parent.children[key] = node
        self._order[node] = None
        return node

    def rows(self, row: int) -> list[tuple[PageTables, int]]:
        """The table rows of the resident request in ``row``, as nodes count them."""
        block = range(row * self.groups, (row + 1) * self.groups)
        return [(self.private, row), *((self.block, own) for own in block)]

    def adopt(self, start: Node, goal: Node, row: int) -> None:
        """Let the request in ``row``, which is at ``start``, go on from ``goal``."""
        self.touch(goal)
        found = [list(self._found(start, goal, place).values()) for place in range(len(goal.ends))]
        # All at once: the first copy of a page may be what lets the nodes go.
        every = [page for columns in found for column in columns for page in column]
        self.pool.share(every)
        for place, (table, own) in enumerate(self.rows(row)):
            first = start.ends[place] // self.pool.page_size
            table.adopt(own, first, found[place], goal.ends[place])
        self.pool.give(every)

    def _found(self, start: Node, goal: Node, place: int) -> dict[int, list[int]]:
        """Pages of one row by column. Where two nodes share a column, the later has all of it."""
        found: dict[int, list[int]] = {}
        for node in goal.since(start):
            first, kept = node.columns[place]
            found |= {first + column: pages for column, pages in enumerate(kept)}
        return found

    def cost(self, start: Node, goal: Node) -> int:
        """Free pages that :meth:`adopt` takes at most."""
        idle = copies = 0
        for place, (table, _) in enumerate(self.rows(0)):
            for column in self._found(start, goal, place).values():
                idle += sum(self.pool.readers[page] == 0 for page in column)
            copies += table.layers * bool(goal.ends[place] % self.pool.page_size)
        return idle + copies

    def shared(self, start: Node, goal: Node) -> int:
        """Whole pages between the two that somebody reads already."""
        count = 0
        for place in range(1 + self.groups):
            whole = goal.ends[place] // self.pool.page_size
            for column, pages in self._found(start, goal, place).items():
                count += column < whole and sum(self.pool.readers[page] > 0 for page in pages)
        return count

    def touch(self, node: Node) -> None:
        """``node`` and what comes before it were used just now."""
        while node.parent is not None:
            self._order.move_to_end(node)
            node = node.parent

    def evict(self, count: int) -> None:
        """Let nodes go, longest unused first, until ``count`` pages more are free.

        What a running request reads frees nothing; it goes only where nothing else is left.
        """
        seen: set[Node] = set()
        while count > 0:
            node = next(iter(self._order))
            if node not in seen and all(self.pool.readers[page] for page in node.pages()):
                seen.add(node)
                self.touch(node)
            else:
                count -= self._remove(node)

    def clear(self) -> None:
        """Forget everything; rows keep what they read."""
        while self._order:
            self._remove(next(iter(self._order)))

    def _remove(self, node: Node) -> int:
        """Take a leaf out; how many pages became free."""
        assert node.parent is not None
        assert not node.children
        del self._order[node]
        del node.parent.children[node.key]
        node.alive = False
        return self.pool.let_go(node.pages())

    def nodes(self) -> list[Node]:
        """All nodes, for :mod:`mor.engine.integrity`."""
        return list(self._order)

    def keepers(self) -> Counter[int]:
        """How often each page is kept, for :mod:`mor.engine.integrity`."""
        return Counter(page for node in self._order for page in node.pages())
