"""Which exact coder a frame has in a tier: the same numbers may lie in frames of different ids, one for each coder."""

import asyncio
from collections.abc import Callable

from kvstore.backend import Backend, Held, Outcome, put_outcome
from kvstore.frame import Frame

Recode = Callable[[Frame, str], Frame]
"""The same numbers under the coder that a tier wants: `recode(frame, tier) -> frame`, exact in both directions.

It gives back the frame itself where it cannot do that, such as where levels are missing, and runs in a thread.
"""


class Coders:
    """Asks the function that a stack was given; without one every tier keeps frames as they come.

    Args:
        recode: The function.
    """

    def __init__(self, recode: Recode | None) -> None:
        self._recode = recode

    @property
    def differ(self) -> bool:
        """Whether tiers may want different coders."""
        return self._recode is not None

    async def coded(self, frame: Frame, tier: Backend, held: Held | None) -> Frame:
        """A frame as it is put into a tier that holds `held` of its chunk."""
        if self._recode is None or (held is not None and held.frame_id == frame.id):
            return frame
        return await asyncio.to_thread(self._recode, frame, tier.name)

    async def outcome(self, frame: Frame, tier: Backend, held: Held) -> Outcome:
        """What putting a frame does to what a tier holds, in whichever coder that is."""
        return put_outcome(held, await self.coded(frame, tier, held))

    def may_extend(self, held: Held, frame: Frame) -> bool:
        """Whether what a tier holds may be more levels of a frame from another tier, as far as ids tell."""
        more = len(held.copy.level_bytes) > frame.levels
        return more and (self.differ or held.frame_id in (frame.id, None))

    async def extends(self, after: Frame, before: Frame, tier: str) -> bool:
        """Whether a frame has more levels of another one, which came from `tier`."""
        if after.levels <= before.levels:
            return False
        if after.id == before.id or self._recode is None:
            return after.id == before.id
        return (await asyncio.to_thread(self._recode, after, tier)).id == before.id
