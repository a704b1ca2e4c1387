"""What became of the norms of a model."""

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class FuseReport:
    """What ``fuse`` or the backend did: paths of modules, and a line on each. Prints as a list.

    ``operations`` are the sums, activations, paddings and modulations that follow a norm, where nothing else reads
    what they read, and activations and paddings wherever they read a norm's result; and the sums of two tensors that
    layer and RMS norms are of. ``remaining`` are those of them that are still a pass of their own, for the reasons in
    ``stayed``.
    """

    #: Norm -> what is in its pass now.
    fused: dict[str, str] = field(default_factory=dict)
    #: Norm -> why there is nothing but the norm in its pass.
    alone: dict[str, str] = field(default_factory=dict)
    #: Norm -> the operation behind it that is still a pass of its own, and why.
    stayed: dict[str, str] = field(default_factory=dict)
    #: Module -> why it is as it was.
    left: dict[str, str] = field(default_factory=dict)
    #: Module -> in what way its forward is another one.
    rewritten: dict[str, str] = field(default_factory=dict)
    #: Convolution -> the batch norm that was folded into it.
    folded: dict[str, str] = field(default_factory=dict)
    operations: int = 0
    #: Whether it is of graphs that ``torch.compile`` captured.
    compiled: bool = False

    def sort(self, paths: Iterable[str]) -> None:
        """Puts entries in the order of these paths of modules, the empty one among them."""
        order = {path: i for i, path in enumerate(paths)}

        def place(entry: tuple[str, str]) -> int:
            path = entry[0]
            while path not in order:
                path = path.rpartition(".")[0]
            return order[path]

        for name in ("fused", "alone", "stayed", "left", "rewritten", "folded"):
            setattr(self, name, dict(sorted(getattr(self, name).items(), key=place)))

    @property
    def remaining(self) -> int:
        return len(self.stayed)

    def __str__(self) -> str:
        titles = {
            "fused": "Fused",
            "alone": "With nothing to fuse" if self.compiled else "Replaced, with nothing to fuse",
            "folded": "Folded into a convolution", "rewritten": "With a forward of the fused calls",
            "stayed": "A pass of its own still", "left": "Left alone",
        }  # fmt: skip
        lines = []
        for name, title in titles.items():
            entries = getattr(self, name)
            if entries:
                lines += [f"{title} ({len(entries)}):"]
                lines += [f"  {path or '(the model)'}: {line}" for path, line in entries.items()]
        if self.operations:
            lines.append(f"Operations behind norms: {self.operations} before, {self.remaining} now.")
        return "\n".join(lines) or "No norms."
