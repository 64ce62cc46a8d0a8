"""ToCa and DuCa: token-wise (Zou et al., 2024, arXiv 2410.05317) and dual feature caching (arXiv 2412.18911).

After a few full steps, self-attention runs every `interval` steps and its output serves in between, the
cross-attention's for `cross_interval` steps; MLPs, in between, run for the tokens of the highest score and
keep the others' outputs. DuCa lets every second of the steps in between skip all blocks: the hidden state
before the head is that of the last step that ran.

Shares: 10 % of the tokens, times 1.495 for MLPs and nothing for cross-attention, as the published weights
come to (Shenyi-Z/ToCa e84096f, Shenyi-Z/DuCa 0a7151b, Open-Sora scripts).

Where it differs: ToCa scores a token by the entropy of its attention to the text, and DuCa by 1 - |v| of its
value vector; both need the inside of attention. Here a score is 1 - |o| / max |o| of the module's own stored
output o, or random as in the authors' HunyuanVideo mode; to either, fresh / interval for every step that a
token has been passed over, of each branch by itself. Rows of text in one sequence with the video always run.
Temporal modules are treated like spatial ones. Full steps are counted from the last of the first ones.
"""

from minidit.cache.plan import (
    REUSE,
    SCORES,
    Load,
    Need,
    Plan,
    RunInfo,
    Tokens,
    Values,
    h,
    sub,
    token_ages,
)


class ToCa:
    """ToCa (Zou et al., 2024, arXiv 2410.05317): MLPs run for the tokens that need it, attention seldom.

    ratio: tokens that run, times mlp_factor in MLPs · first: full steps at the start
    interval, cross_interval: from full step to full step of attention and MLP, and of cross-attention
    score: norm or random · fresh: weight of being passed over
    """

    needs_values = False
    knob = ("interval", 2, 10)
    aggressive = False  # every second step in between skips all blocks

    def __init__(
        self,
        ratio: float = 0.1,
        interval: int = 3,
        cross_interval: int = 6,
        first: int = 3,
        mlp_factor: float = 1.495,
        score: str = "norm",
        fresh: float = 0.25,
    ):
        name = type(self).__name__.lower()
        if not 0 < ratio * mlp_factor <= 1 or interval < 2 or cross_interval < 1 or first < 1 or fresh < 0:
            raise ValueError(
                f"{name}: ratio={ratio}, mlp_factor={mlp_factor}, interval={interval}, first={first}, "
                f"cross_interval={cross_interval}, fresh={fresh}; wanted a share of tokens up to 1, an "
                f"interval of 2 and more, and counts of 1 and more"
            )
        if score not in SCORES:
            raise ValueError(f"{name}: unknown score {score!r}; choose one of {', '.join(SCORES)}")
        self.share, self.interval, self.cross_interval = ratio * mlp_factor, interval, cross_interval
        self.first, self.score, self.fresh, self.name = first, score, fresh, name

    def reset(self, run: RunInfo) -> tuple[Need, ...]:
        if run.token_ranks > 1:
            raise ValueError(
                f"{self.name}: no rank knows the scores of all tokens; run it without token ranks"
            )
        if len(run.steps) <= self.first:
            raise ValueError(f"{self.name}: first={self.first} leaves none of {len(run.steps)} steps")
        self.constants = f"published for open-sora-1.2{'' if run.family == 'open_sora' else ', used here'}"
        keys = [(block, name) for block in range(run.depth) for name in run.subs]
        self.attention = [key for key in keys if "attn" in key[1]]
        self.cross = [key for key in keys if "cross" in key[1]]
        self.mlps = [key for key in keys if "mlp" in key[1]]
        self.tokens, self.text, self.end = run.tokens, run.text_tokens, h(run.depth)
        ages = [Need(token_ages(*key)) for key in self.mlps] if self.fresh else []
        ends = [Need(self.end)] if self.aggressive else []
        return (*(Need(sub(*key)) for key in keys), *ages, *ends)

    def plan(self, step) -> Plan:
        since = step.i - self.first + 1  # steps after the last of the first ones
        if since <= 0:
            return self.made([], [*self.attention, *self.cross, *self.mlps], "full")
        place = since % self.interval
        if self.aggressive and place and place % 2 == 0:
            return Plan((Load(self.end),), label="skip")
        reused, computed = [], []
        (computed if since % self.cross_interval == 0 else reused).extend(self.cross)
        (computed if place == 0 else reused).extend(self.attention)
        if place == 0:
            return self.made(reused, [*computed, *self.mlps], "full")
        return self.made(reused, computed, "tokens", self.pick(step.i))

    def pick(self, seed: int) -> Tokens:
        """What MLPs do in between."""
        count = max(1, round(self.share * self.tokens))
        fresh = self.fresh / self.interval
        seed = seed if self.score == "random" else 0
        return Tokens(count, self.tokens, self.score, fresh, seed, self.text)

    def made(self, reused: list, computed: list, label: str, tokens: Tokens | None = None) -> Plan:
        """A plan: what is reused, what is computed and kept, and how MLPs run, if not in full."""
        subs = [(key, REUSE) for key in reused]
        if tokens is not None:
            subs += [(key, tokens) for key in self.mlps]
            computed = [*computed, *self.mlps]
        keep = tuple(sub(*key) for key in computed) + ((self.end,) if self.aggressive else ())
        return Plan(subs=tuple(subs), keep=keep, label=label)

    def tell(self, step, values: Values) -> None:
        pass


class DuCa(ToCa):
    """DuCa (Zou et al., 2024, arXiv 2412.18911): as ToCa, and every second step in between skips all blocks.

    The options are those of ToCa.
    """

    aggressive = True
