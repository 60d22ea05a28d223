"""A round whose mean asks for one client after another: each is trained then, and its message let go once it is folded.

So a process holds few of a cohort's messages at once, and the bits are those of a round trained first and mixed after.
"""

from collections.abc import Iterator, Mapping

from fedpipe.mixing import Sent, all_right, row_id
from fedpipe.rounds import Rounds, Rows, World


class Coming(Mapping[str, Sent]):
    """What the clients of groups send, by their rows' names: trained as far as it is asked for.

    A message is there until another is asked for. doubt: whether one was let go that nobody has looked at.
    """

    def __init__(self, groups: list[Rows], trained: Iterator[Sent]):
        self.ids, self.trained = {row_id(r): r for g in groups for r in g}, trained
        self.here: dict[str, Sent] = {}
        self.last: Sent | None = None
        self.doubt = False

    def __getitem__(self, name: str) -> Sent:
        if self.last:
            self.last.let_go()
        while name not in self.here:
            sent = next(self.trained)
            self.here[row_id(sent.row)] = sent
        self.last = self.here[name]
        self.doubt |= self.last.doubt is not None
        return self.last

    def __contains__(self, name: object) -> bool:
        return name in self.ids

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids)

    def __len__(self) -> int:
        return len(self.ids)


def played(rounds: Rounds, t: int, world: World, groups: list[Rows]) -> tuple[World, list[Sent]]:
    """The world after round t, and what came of it, the messages let go.

    Where a client that nobody has looked at may have sent values that are not finite, the round is played again and
    each is looked at, from then on in every round.
    """
    if not foldable(rounds, t):
        sent = list(rounds.trained(t, world, groups, mixed=True))
        return rounds.mix(t, world, sent), sent
    measured = len(rounds.peaks)
    coming = Coming(groups, rounds.trained(t, world, groups, mixed=not rounds.careful))
    made = rounds.made(t, world, coming)
    sent = [coming[name] for name in coming]
    if coming.doubt and not all_right(made):
        rounds.careful = True
        del rounds.peaks[measured:]
        return played(rounds, t, world, groups)
    return rounds.after(t, world, made, sent), sent


def foldable(rounds: Rounds, t: int) -> bool:
    """Whether each message of a round is read once, by a mean that folds what arrives."""
    read = [u for r in rounds.by_round.get(t, []) if r["kind"] == "mix" for u in r["updates"]]
    return rounds.rt.method.aggregate is None and len(set(read)) == len(read)
