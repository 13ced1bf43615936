"""Side lengths and channels of a network, level by level."""

MIN_SIDE = 6
"""Sides of fewer pixels are not halved again."""


class ResolutionLayout:
    """Side lengths and channels of `depth` levels; index 0 is the image.

    The first levels halve the side while it is at least MIN_SIDE, and double the channels, up to
    8 times `width`; the others keep both.
    """

    def __init__(self, side: int, channels: int, depth: int, width: int):
        self.depth = depth
        self.sides, self.channels = [side], [channels]
        for level in range(depth):
            halve = self.sides[-1] >= MIN_SIDE
            self.sides.append(self.sides[-1] // 2 if halve else self.sides[-1])
            last = self.channels[-1]
            self.channels.append((width * min(2**level, 8)) if halve or level == 0 else last)

    @property
    def deepest(self) -> tuple[int, int, int]:
        """Channels, height and width of the deepest feature map."""
        return self.channels[-1], self.sides[-1], self.sides[-1]

    @property
    def flat(self) -> int:
        """Elements of the deepest feature map."""
        return self.channels[-1] * self.sides[-1] ** 2
