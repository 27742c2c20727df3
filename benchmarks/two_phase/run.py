"""What does a two-phase window cost beside a one-phase window of the same encoders?

python -m benchmarks.two_phase.run
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import gradfold
from benchmarks.paired import ratio, time_rounds, write
from gradfold.workloads.text_data import pad_columns
from gradfold.workloads.translation import Matcher, contrast, embed

QUESTION = "What does a two-phase window cost beside a one-phase window of the same encoders?"
NUM_ROWS, ROWS, NUM_WORDS, NUM_ROUNDS = 512, 32, 3002, 30
RESULT = Path(__file__).parent / "results" / "cpu.json"


def main() -> None:
    """Measure, print and write."""
    torch.set_num_threads(1)
    results = measure()
    for name, value in results.items():
        print(f"{name:42s} {value}")
    settings = {"rows": NUM_ROWS, "micro_batch": ROWS, "rounds": NUM_ROUNDS, "model": "workload matching"}
    write(RESULT, QUESTION, settings, results)


def sentences(generator: torch.Generator) -> list[dict[str, Tensor]]:
    """Pairs of random words, as long as captions are: 12 on average, 24 at most."""
    lengths = torch.randn(NUM_ROWS, 2, generator=generator).mul(4).add(13).clamp(4, 24).long().tolist()
    return [
        {
            language: torch.randint(2, NUM_WORDS, (length,), generator=generator)
            for language, length in zip(("en", "de"), pair, strict=True)
        }
        for pair in lengths
    ]


def measure() -> dict[str, object]:
    """Paired ratios."""
    torch.manual_seed(0)
    model = Matcher(NUM_WORDS)
    samples = sentences(torch.Generator().manual_seed(0))

    def one_phase_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return contrast(model, embed(model, batch))

    make = partial(gradfold.Accumulator, model, micro_batch_size=ROWS, collate=pad_columns, self_check=False)
    two_phase, one_phase = make(gradfold.TwoPhaseLoss(embed, contrast)), make(one_phase_loss)

    def window(accumulator: gradfold.Accumulator) -> None:
        model.zero_grad()
        accumulator.backward(samples)

    def by_hand() -> None:
        """The same gradient in the fewest lines, with nothing looked at: what any code for it has to do."""
        model.zero_grad()
        parts = [pad_columns(samples[start : start + ROWS]) for start in range(0, NUM_ROWS, ROWS)]
        with torch.no_grad():
            found = [embed(model, part) for part in parts]
        english, german = (torch.cat(column).requires_grad_() for column in zip(*found, strict=True))
        contrast(model, (english, german)).backward()
        for number, part in enumerate(parts):
            rows = slice(number * ROWS, (number + 1) * ROWS)
            torch.autograd.backward(embed(model, part), (english.grad[rows], german.grad[rows]))

    def sweep() -> None:
        with torch.no_grad():
            for start in range(0, NUM_ROWS, ROWS):
                embed(model, pad_columns(samples[start : start + ROWS]))

    def full_batch() -> None:
        model.zero_grad()
        one_phase_loss(model, pad_columns(samples)).backward()

    arms = {
        "two phases": partial(window, two_phase),
        "one phase": partial(window, one_phase),
        "by hand": by_hand,
        "sweep alone": sweep,
        "full batch": full_batch,
    }
    elapsed_s = time_rounds(arms, NUM_ROUNDS, 2)
    return {
        "one phase, milliseconds": round(1000 * sorted(elapsed_s["one phase"])[NUM_ROUNDS // 2], 1),
        **{f"{arm} / one phase": ratio(elapsed_s, arm, "one phase") for arm in arms if arm != "one phase"},
        "two phases / by hand": ratio(elapsed_s, "two phases", "by hand"),
    }


if __name__ == "__main__":
    main()
