"""Sides and channels of a network, level by level."""

SMALLEST = 6
"""A side of fewer pixels than this is not halved again."""


class ResolutionLayout:
    """Sides and channels of a stack of `depth` levels, the image's first.

    The first levels halve the side while it is at least SMALLEST and double the channels, up to
    8 times `width`; the rest keep both.
    """

    def __init__(self, side: int, channels: int, depth: int, width: int):
        self.sides, self.channels = [side], [channels]
        for level in range(depth):
            halve = self.sides[-1] >= SMALLEST
            self.sides.append(self.sides[-1] // 2 if halve else self.sides[-1])
            last = self.channels[-1]
            self.channels.append((width * min(2**level, 8)) if halve or level == 0 else last)

    @property
    def depth(self) -> int:
        """Levels, the image itself not counted."""
        return len(self.sides) - 1

    @property
    def deepest(self) -> tuple[int, int, int]:
        """Channels, height and width of the deepest map."""
        return self.channels[-1], self.sides[-1], self.sides[-1]

    @property
    def flat(self) -> int:
        """Numbers in one image's deepest map."""
        return self.channels[-1] * self.sides[-1] ** 2
