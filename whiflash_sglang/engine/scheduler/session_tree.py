"""Evict first what only older turns of a conversation have: compacted history, a dropped branch, stripped thinking.

With `--enable-session-radix-cache` SGLang keeps a session's KV longer than a stranger's, and an older turn's end until
the session closes, whether or not a later turn continues it.
"""

from collections import Counter
from typing import Any

from sglang.srt.mem_cache.unified_cache.session_ref_tracker import UnifiedSessionRefTracker
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

MARK = "\x1f"
"""Character between a hash of the tenant and a client's id in the scheduler's id of a session."""
LINE = f"{MARK}line:"
"""Beginning of a client's id, after the mark, of a session in which each request continues the conversation."""
AGE = 2.0**40
"""Subtracted from a superseded node's last access, to make it the oldest. Ranks agree on the order of such nodes."""

MOST_OPEN = 1024
"""Most open sessions, many more than have room in a KV pool. SGLang bounds only the closed ones."""


def surplus(sessions: list[str]) -> str:
    """Return the session to give up, of the scheduler's ids: the first one of the tenant that has the most."""
    tenants = [session.rpartition(MARK)[0] for session in sessions]
    return sessions[tenants.index(Counter(tenants).most_common(1)[0][0])]


class SessionTree(UnifiedRadixCache):  # type: ignore[misc]
    """A tree in which a turn's prompt belongs to its session once it has been prefilled, not when the turn ends."""

    def checkpoint_into_tree(self, req: Any, *, up_to: int, **named: Any) -> None:
        super().checkpoint_into_tree(req, up_to=up_to, **named)
        prefilled = not req.finished() and up_to >= len(req.origin_input_ids)
        if prefilled and not self.disable and LINE in (req.session_id or ""):
            self.session_refs.register_session_ref(req, leaf=req.last_node)


class SessionTracker(UnifiedSessionRefTracker):  # type: ignore[misc]
    """A tracker that keeps only the KV that the newest turn continues, if a session is one conversation."""

    def ensure_session_generation(self, session_id: str) -> int:
        """Return the generation of a session that is used now. Too many open sessions: the one that its client has
        probably left is closed, until its next request."""
        generation, opened = super().ensure_session_generation(session_id), self._session_generations
        opened[session_id] = opened.pop(session_id)
        if len(opened) > MOST_OPEN:
            self.release_radix_session(surplus([*opened]))
        return int(generation)

    def register_session_ref(self, req: Any, leaf: Any) -> None:
        """Release the KV that only a session's older turns use, and make it the first to be evicted."""
        super().register_session_ref(req, leaf)
        session, given_up = req.session_id or "", dict[int, Any]()
        if LINE not in session:
            return
        for component in self.components:
            newest = component.resolve_session_leaf(req, self.tree_core.node_by_id(leaf))
            leaves = set(component._session_leaves.get(session, ()))
            for node in leaves - {newest} if newest in leaves else ():
                component._dec_session_coverage(session, node)
                component._unmark_session_leaf(session, node)
                while node.parent is not None:
                    given_up[node.id] = node
                    node = node.parent
        alone = [n for n in given_up.values() if not any(one.session_ref(n) for one in self.components)]
        for node in sorted(alone, key=lambda node: -node.last_access_time):
            node.last_access_time -= AGE  # the order of the tree's leaves
            node.hit_count = 0  # else `slru` evicts it after all that was used once
            for lists in (self.tree_core.lru_lists, self.tree_core.host_lru_lists):
                for lru in (lists[component.component_type] for component in self.components):
                    if lru.in_list(node):  # the order of windows and recurrent states
                        lru._remove_node(node)
                        lru._add_node_after(lru.tail.lru_prev[lru._pt], node)
