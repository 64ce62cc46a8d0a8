"""Which backend `--attention auto` takes: what each backend can be given, and an order per card and shape.

Plain data and rules, the same in every run: nothing is timed and nothing is tried. A row's backends are asked
in turn, and the first that takes the tensors is used. `python -m benchmarks.kernels` measures on a card and
prints rows to put in here, with their evidence.
"""

from dataclasses import dataclass

HALF = ("bf16", "fp16")
SHORT = 1024  # queries: below, a head is a few tiles and launches weigh more than products
TORCHS_OWN = ("cpu", "other")  # cards that no row speaks of: auto leaves the choice to torch


@dataclass(frozen=True)
class Case:
    """What a choice depends on."""

    card: str  # "cpu"; "sm_80", "sm_90" or "sm_100", one compute capability each; "other"
    dtype: str  # "bf16", "fp16", "fp32", or torch's name of another
    batch: int  # B
    queries: int  # L
    keys: int  # M
    qk_width: int  # R
    v_width: int  # K
    needs_grad: bool = False

    @property
    def shape(self) -> str:
        """One of three: "cross" has not as many keys as queries; self-attention is "short" or "long"."""
        if self.queries != self.keys:
            return "cross"
        return "short" if self.queries < SHORT else "long"

    @property
    def is_sliced(self) -> bool:
        return self.qk_width < self.v_width


@dataclass(frozen=True)
class Takes:
    """What a backend can be given on a card."""

    dtypes: tuple[str, ...] = ()  # () is any
    multiple: int = 1  # widths are multiples of so many elements; in fp32 of half as many
    widest: int = 2**16  # head
    pads: bool = False  # takes one width only: narrower queries and keys get zeros, which change no score
    most_batch: int = 2**31
    least_keys: int = 1
    has_grad: bool = True
    source: str = ""


SDP_UTILS = "aten/src/ATen/native/transformers/cuda/sdp_utils.cpp of PyTorch"
TAKES = {
    "flash": Takes(HALF, widest=256, pads=True, source=f"{SDP_UTILS}, check_head_dim_size_flash"),
    "cudnn": Takes(
        HALF, multiple=8, widest=128, most_batch=65535, least_keys=2,
        source=f"{SDP_UTILS}, check_cudnn_tensor_shapes; wider heads need Hopper and cuDNN above 9.22",
    ),
    "efficient": Takes(
        (*HALF, "fp32"), multiple=8, source=f"{SDP_UTILS}, check_head_dim_size_mem_efficient"
    ),
    "math": Takes(source="matrix products and a softmax"),
    "triton": Takes(HALF, multiple=8, widest=128, has_grad=False, source="minidit_kernels/pca_attention.py"),
    "flash_attn": Takes(HALF, widest=256, pads=True, source="flash_attn 2, README"),
    "sage": Takes(HALF, widest=128, pads=True, has_grad=False, source="SageAttention 2: scores in int8"),
}  # fmt: skip
ON_CPU = {
    "math": Takes(source="as on a card"),
    "flash": Takes(pads=True, source="torch's blocked kernel for CPUs"),
    "triton": Takes(multiple=8, widest=128, has_grad=False, source="under TRITON_INTERPRET=1"),
}


@dataclass(frozen=True)
class Row:
    """An order of backends. The first row that fits a case counts; () and None fit everything."""

    cards: tuple[str, ...]
    backends: tuple[str, ...]
    evidence: str
    shapes: tuple[str, ...] = ()
    widths: tuple[int, ...] = ()  # of values
    dtypes: tuple[str, ...] = ()
    is_sliced: bool | None = None
    measured: bool = False  # on such a card, by benchmarks/kernels.py

    def fits(self, case: Case) -> bool:
        """Whether this row speaks of such tensors."""
        wanted = (self.cards, case.card), (self.shapes, case.shape), (self.widths, case.v_width)
        listed = all(not names or name in names for names, name in (*wanted, (self.dtypes, case.dtype)))
        return listed and self.is_sliced in (None, case.is_sliced)


TABLE = (
    Row(
        ("sm_90", "sm_100"), ("cudnn", "flash", "efficient", "math"), shapes=("long",), widths=(128,),
        dtypes=HALF, is_sliced=False,
        evidence="PyTorch 2.5 release notes: cuDNN up to 75 % faster than FlashAttention 2 on an H100; "
        "torch's own order of 2.13 puts cuDNN first on both cards",
    ),
    Row(
        ("sm_90", "sm_100"), ("cudnn", "triton", "flash", "efficient", "math"), shapes=("long",),
        dtypes=HALF, is_sliced=True,
        evidence="cuDNN takes narrow queries and keys as they are, and leads at full width",
    ),
    Row(
        ("sm_100",), ("cudnn", "flash", "efficient", "math"), shapes=("long",), dtypes=HALF,
        evidence="FlashAttention 2 was written for sm_80 and uses none of this card's matrix instructions",
    ),
    Row(
        ("sm_80",), ("triton", "efficient", "flash", "math"), shapes=("long",), dtypes=HALF, is_sliced=True,
        evidence="flash would pad queries and keys back; the kernel compiles for this card without spills",
    ),
    Row(
        ("sm_80", "sm_90", "sm_100"), ("efficient", "flash", "math"), shapes=("short", "cross"), dtypes=HALF,
        is_sliced=True,
        evidence="takes narrow queries and keys without a pass that pads them, where little else is done",
    ),
    Row(
        ("sm_80", "sm_90", "sm_100"), ("flash", "efficient", "math"),
        evidence="torch's order before cuDNN; of text, every length would build one more cuDNN plan",
    ),
)  # fmt: skip


def refusal(backend: str, case: Case) -> str | None:
    """Why a backend does not take such tensors, or None where it does. "torch" takes everything."""
    if backend == "torch":
        return None
    takes = (ON_CPU if case.card == "cpu" else TAKES).get(backend)
    if takes is None:
        return "it needs a GPU"
    multiple = takes.multiple if case.dtype in HALF else takes.multiple // 2 or 1
    narrow, wide = sorted((case.qk_width, case.v_width))
    if takes.dtypes and case.dtype not in takes.dtypes:
        return f"it takes {', '.join(takes.dtypes)}, not {case.dtype}"
    if wide > takes.widest:
        return f"it takes heads up to {takes.widest} wide, not {wide}"
    if wide % multiple or narrow % multiple:
        return f"it takes widths that are multiples of {multiple}, not {case.qk_width} and {case.v_width}"
    if takes.pads and case.qk_width > case.v_width:
        return f"it takes one width, not queries of {case.qk_width} and values of {case.v_width}"
    if case.batch > takes.most_batch:
        return f"it takes a batch up to {takes.most_batch}, not {case.batch}"
    if case.keys < takes.least_keys:
        return f"it takes {takes.least_keys} keys and more, not {case.keys}"
    if case.needs_grad and not takes.has_grad:
        return "it has no gradients"
    return None


def pads(backend: str, case: Case) -> bool:
    """Whether queries and keys get zeros up to the values' width. Torch's own choice is left alone."""
    if not case.is_sliced or backend == "torch":
        return False
    return (ON_CPU if case.card == "cpu" else TAKES)[backend].pads


def choose(case: Case) -> str:
    """The backend that auto takes; "torch" is torch's own choice."""
    if case.card in TORCHS_OWN:
        return "torch"
    row = next(row for row in TABLE if row.fits(case))
    return next(backend for backend in row.backends if refusal(backend, case) is None)
