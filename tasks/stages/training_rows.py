"""The images of a round as rows to train on: which of them, and which may share a batch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from calligrapher.errors import ParamsError
from calligrapher.model.policy import Conditioning
from calligrapher.rl.background import Background
from calligrapher.rl.credit import less_their_mean, letter_credit
from calligrapher.rl.rows import TrainRows
from calligrapher.sampling.exploration import Window
from calligrapher.tables.parquet import read_shard, read_table
from calligrapher.tables.schema import LETTER_ADVANTAGES
from tasks.artifacts.artifact import Artifact
from tasks.resources.resources import Resources
from tasks.stages.advantage import ADVANTAGES_FILE, SIDES


@dataclass(frozen=True)
class RoundRows:
    """The rows of a round, in the order of the rollout; those of one length lie in one part.

    kinds: rows of one kind may share a batch; None where all may. left_out: kept images that are
    none of the rows, for they teach nothing.
    """

    parts: list[TrainRows]
    at: list[tuple[int, int]]  # of each row: its part, and which row of it
    kinds: list[tuple[int, int]] | None
    teaches: list[bool]  # whether an advantage of the row, or of a letter of it, differs from 0
    left_out: int

    def __len__(self) -> int:
        return len(self.at)

    def pick(self, index: list[int]) -> TrainRows:
        """Return the rows `index`, which are of one length."""
        (part,) = {self.at[i][0] for i in index}
        return self.parts[part].pick([self.at[i][1] for i in index])


def training_rows(resources: Resources, rollout: Artifact, advantages: Artifact) -> RoundRows:
    """Return the kept images of a round as training rows.

    Groups whose advantages are all 0 are left out where no KL holds their images to the reference,
    and where the round was refilled in their place.
    Where lengths differ, rows share a batch that share their length and their shard: they have the
    neighbours that they had in the rollout. Raises ParamsError where images of a group are to be
    compared that started from noise of their own.
    """
    table = read_table(advantages.file(ADVANTAGES_FILE))
    per_letter = LETTER_ADVANTAGES.name in table
    letters = table[LETTER_ADVANTAGES.name] if per_letter else [[]] * len(table["kept"])
    teaches = [
        kept and (own != 0 or any(letter["advantage"] for letter in spelled))
        for own, kept, spelled in zip(table["advantage"], table["kept"], letters, strict=True)
    ]
    names = ["sample_id", "case_id", "group_id", "member", "x0"]
    explores = resources.params.rl.exploration
    # What the images have in common is the rollout's to say: a fork may have other params by now.
    sampled = rollout.params
    is_forked = sampled["rollout"].get("shared_trunk", False)
    if resources.params.rl.compares_images:
        algorithm = resources.params.algorithm
        noise = sampled.get(algorithm, {}).get("noise")
        if noise != "group":
            raise ParamsError(
                f"{algorithm}.noise must have been 'group' in the rollout where"
                f" direction is 'image'. Got {noise!r}: its images differ by the noise that each"
                " started from. Rerun from the rollout of that round on (`calligrapher rerun RUN"
                " ROUND/rollout ... --downstream`)."
            )
    if explores is not None:
        names += ["trajectory", "log_prob", "window_sigmas"]
        if explores.keeps_means:
            names.append("mean_old")
    shards = [read_shard(rollout.file(name), names) for name in sorted(rollout.files)]

    def column(name: str) -> list:
        return [value for shard in shards for value in shard[name]]

    assert column("sample_id") == table["sample_id"], (
        "rollout and advantages must hold the same images in the same order"
    )
    groups, members = column("group_id"), column("member")
    kept = [i for i, k in enumerate(table["kept"]) if k]
    keep = kept
    if not resources.params.rl.needs_reference or resources.params.rollout.refill:
        spread = {groups[i] for i in kept if teaches[i]}
        keep = [i for i in kept if groups[i] in spread]
    x0, case_ids = column("x0"), column("case_id")
    by_length: dict[int, list[int]] = {}
    for i in keep:
        by_length.setdefault(len(x0[i]), []).append(i)
    cases = {case.case_id: case for case in resources.cases.train}
    device = resources.model.device
    tensors = {name: column(name) for name in names[5:]}

    def part(index: list[int]) -> TrainRows:
        def rows(values: list[Tensor]) -> Tensor:
            return torch.stack([values[i] for i in index]).to(device)

        window = None
        if explores is not None:
            trajectory = rows(tensors["trajectory"])
            mean = rows(tensors["mean_old"]) if explores.keeps_means else trajectory[:, 1:]
            trunks = torch.tensor([groups[i] for i in index]) if is_forked else None
            window = Window(
                trajectory, rows(tensors["log_prob"]), mean, rows(tensors["window_sigmas"]), trunks
            )
        picked = [cases[case_ids[i]] for i in index]
        conditioning = resources.conditioning.batch(picked)
        background = None
        if resources.params.rl.holds_background:
            background = Background.of(resources.conditioning.sources(picked), conditioning)
        credit = None
        if per_letter:
            size = resources.params.model.width, resources.params.model.height
            found = [
                _credit(letters[i], table["advantage"][i], conditioning, x0[i].shape[-1], size)
                for i in index
            ]
            credit = torch.stack(found).to(device)
        clean, deviation = rows(x0), None
        if resources.params.rl.compares_images:
            deviation = less_their_mean(clean, [groups[i] for i in index])
        return TrainRows(
            x0=clean,
            conditioning=conditioning,
            advantages=torch.tensor([table["advantage"][i] for i in index], device=device),
            places=torch.tensor([(groups[i], members[i]) for i in index]),
            window=window,
            background=background,
            credit=credit,
            deviation=deviation,
        )

    at = {i: (p, n) for p, index in enumerate(by_length.values()) for n, i in enumerate(index)}
    kinds = None
    if len({len(latent) for latent in x0}) > 1:
        shard_of = [number for number, shard in enumerate(shards) for _ in shard["sample_id"]]
        kinds = [(shard_of[i], len(x0[i])) for i in keep]
    return RoundRows(
        [part(index) for index in by_length.values()],
        [at[i] for i in keep],
        kinds,
        [teaches[i] for i in keep],
        len(kept) - len(keep),
    )


def _credit(
    letters: list[dict[str, float]],
    own: float,
    conditioning: Conditioning,
    channels: int,
    size: tuple[int, int],
) -> Tensor:
    """Return the advantage of each place of an image, [L, D]; size: its width and height in px."""
    return letter_credit(
        [letter["advantage"] for letter in letters],
        [[letter[side] for side in SIDES] for letter in letters],
        own,
        image_ids=conditioning.image_ids,
        channels=channels,
        width=size[0],
        height=size[1],
    )
