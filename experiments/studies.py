"""The studies, as data: which arms, on what, and what each is asked.

An arm is a name of `gtpo_jax.config.ALGORITHMS` and settings that differ from it; all else is
the preset's and the same for every arm, seeds and problems included. Arms of one name are one
run, whichever study asks for it.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Arm:
    """`formula`: its reward and its advantage, as they differ from the other arms."""

    algorithm: str
    formula: str
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """`contrasts` are the pairs of arms whose difference is told; the verdict is about the
    first of them."""

    question: str
    arms: tuple[str, ...]
    contrasts: tuple[tuple[str, str], ...]
    benchmarks: dict[str, tuple[str, ...]]  # preset -> names of tasks
    seeds: int = 3


@dataclass(frozen=True)
class Preset:
    """A scale. `settings` come on top of `config` for every arm, `cold_start` are those of the
    supervised run that the arms of a seed begin from. "{data}" is the folder of --data.

    `samples`: answers drawn for each problem of a benchmark when a run has ended, `count`: its
    first problems only; 0: all.
    """

    config: str
    config_argument: str  # "{algorithm}": the arm's
    settings: dict[str, Any]
    cold_start: dict[str, Any]
    samples: int
    about: str
    count: int = 0
    traces: bool = False  # the cold start imitates traces of `coldstart`, made first
    cold_starts: int | None = None  # None: one a seed, which its arms share


RETURNS = "R_j = sum_m>=j gamma^(m-j) r_m"
TURNS = "r_j = r_acc + r_format"
GTPO = "A_j = (R_j - mean)/std over the group's turns"

ARMS = {
    "gtpo": Arm("gtpo", f"{TURNS}, r_acc shaped, {RETURNS}, gamma 0.9; {GTPO}"),
    "grpo": Arm("grpo", "r = min(r_acc, r_format) of the whole; A = (r - mean)/std"),
    "grpo_outcome": Arm("grpo_outcome", "r = r_acc; A = (r - mean)/std"),
    "grpo_sum": Arm("grpo_sum", f"r = sum_j r_j, {TURNS}, r_acc shaped; A = (r - mean)/std"),
    # GTPO, one of its parts taken away.
    "no_turn_rewards": Arm(
        "gtpo",
        f"r_j = r_acc, shaped, {RETURNS}, gamma 0.9; {GTPO}",
        {"reward.format_penalty": 0.0},
    ),
    "gamma_1": Arm(
        "gtpo",
        f"{TURNS}, r_acc shaped, R_j = sum_m>=j r_m; {GTPO}",
        {"advantage.options.gamma": 1.0},
    ),
    "no_shaping": Arm(
        "gtpo",
        f"{TURNS}, r_acc in {{0, 1}}, {RETURNS}, gamma 0.9; {GTPO}",
        {"reward.alpha": 0.0},
    ),
    **{
        f"gamma_{gamma}": Arm(
            "gtpo", f"as gtpo, gamma {gamma}", {"advantage.options.gamma": gamma}
        )
        for gamma in (0.0, 0.5, 0.8, 0.95)
    },
    **{
        f"scope_{scope}": Arm(
            "gtpo", f"as gtpo, mean and std by {scope}", {"advantage.options.scope": scope}
        )
        for scope in ("batch", "turn", "group_trajectory")
    },
    "keep_equal_groups": Arm(
        "gtpo",
        "as gtpo, groups that earned alike normalised as well",
        {"advantage.options.drop_equal_groups": False},
    ),
    **{
        f"alpha_{alpha}": Arm("gtpo", f"as gtpo, alpha {alpha}", {"reward.alpha": alpha})
        for alpha in (0.25, 1.0)
    },
    "embedding": Arm(
        "gtpo",
        "as gtpo, similarity by a sentence encoder",
        {"reward.similarity": "embedding"},
    ),
    "dr_grpo": Arm("dr_grpo", "r = r_acc; A = r - mean; token sum over a constant"),
    "rloo": Arm("rloo", "r = r_acc; A = r - mean of the others"),
    "dapo": Arm(
        "dapo",
        "r = r_acc, overlong penalty; A = (r - mean)/std; groups alike are drawn again",
    ),
    "gspo": Arm("gspo", "r = r_acc; A = (r - mean)/std; ratio of whole sequences"),
    "mt_grpo": Arm("mt_grpo", "A_outcome + A_turn before the last tool result"),
    "irc": Arm("irc", "GN(discounted r) + 0.3 A_outcome"),
}

MATH = ("aime24", "aime25", "math500", "amc23", "olympiadbench", "svamp", "gsm8k")
SMALL = {"tiny": ("arithmetic",), "smollm2": ("gsm8k", "svamp"), "smollm2_cpu": ("svamp",)}
ALL_MATH = {**SMALL, "qwen25_7b": MATH}


def against(baseline: str, *arms: str) -> tuple[tuple[str, str], ...]:
    """Each of the arms compared with the same one."""
    return tuple((arm, baseline) for arm in arms)


# Arms, and what tells the reward and the credit apart.
MAIN = (
    ("grpo", "grpo_outcome", "grpo_sum", "gtpo"),
    (
        ("gtpo", "grpo"),
        ("gtpo", "grpo_sum"),
        ("gtpo", "grpo_outcome"),
        ("grpo_sum", "grpo"),
    ),
)

STUDIES = {
    "main_math": Study(
        "Does credit by turn help in mathematics, reward and credit told apart?",
        *MAIN,
        ALL_MATH,
        seeds=5,
    ),
    "main_general": Study(
        "Does it help in commonsense questions and in programs?",
        *MAIN,
        {
            "tiny": ("arithmetic",),
            "smollm2": ("strategyqa", "commonsenseqa"),
            "smollm2_cpu": ("commonsenseqa",),
            "qwen25_7b": ("strategyqa", "commonsenseqa", "humaneval", "mbpp"),
        },
        seeds=5,
    ),
    "ablation": Study(
        "Which of GTPO's three parts does the work?",
        ("gtpo", "no_turn_rewards", "gamma_1", "grpo_sum", "no_shaping"),
        against("gtpo", "no_turn_rewards", "gamma_1", "grpo_sum", "no_shaping"),
        ALL_MATH,
    ),
    "gamma": Study(
        "How much should later rewards count?",
        ("gamma_0.0", "gamma_0.5", "gamma_0.8", "gtpo", "gamma_0.95", "gamma_1"),
        against("gtpo", "gamma_1", "gamma_0.0", "gamma_0.5", "gamma_0.8", "gamma_0.95"),
        ALL_MATH,
    ),
    "scope": Study(
        "Over which turns should returns be normalised, and does the choice change lengths?",
        ("gtpo", "scope_batch", "scope_turn", "scope_group_trajectory", "keep_equal_groups"),
        against(
            "gtpo", "scope_turn", "scope_batch", "scope_group_trajectory", "keep_equal_groups"
        ),
        ALL_MATH,
    ),
    "shaping": Study(
        "How much credit should code that resembles a right one's earn, and by what likeness?",
        ("no_shaping", "alpha_0.25", "gtpo", "alpha_1.0", "embedding"),
        against("gtpo", "no_shaping", "alpha_0.25", "alpha_1.0", "embedding"),
        ALL_MATH,
    ),
    "relatives": Study(
        "How does it compare with its relatives?",
        ("gtpo", "grpo", "dr_grpo", "rloo", "dapo", "gspo", "mt_grpo", "irc"),
        against("gtpo", "grpo", "dr_grpo", "rloo", "dapo", "gspo", "mt_grpo", "irc"),
        ALL_MATH,
    ),
    "overhead": Study(
        "What does GTPO add to the time of a step?",
        ("grpo", "gtpo"),
        (("gtpo", "grpo"),),
        ALL_MATH,
        seeds=5,
    ),
}

PRESETS = {
    "tiny": Preset(
        "configs/tiny.py",
        "{algorithm}",
        {
            "steps": 50,
            "eval_every": 5,
            "checkpoint_every": 10,
            "trajectories_every": 25,
            "keep_checkpoints": 1,
            "optim.lr": 1e-4,
        },
        {},
        samples=4,
        about="the embedded task, a model of half a million parameters, 2 CPU cores",
    ),
    "smollm2": Preset(
        "configs/smollm2_gsm8k.py",
        "{algorithm}",
        {"task.path": "{data}/gsm8k", "keep_checkpoints": 1},
        {"sft.path": "{traces}", "task.path": "{data}/gsm8k"},
        samples=8,
        about="SmolLM2-135M, GSM8K's traces and then its training problems, one GPU",
        traces=True,
        cold_starts=1,
    ),
    "smollm2_cpu": Preset(
        "configs/smollm2_gsm8k.py",
        "cpu:{algorithm}",
        {
            "task.path": "{data}/gsm8k",
            "keep_checkpoints": 1,
            "rollout.max_tokens": 96,
            "learn.row_tokens": 480,
            "task.eval_count": 4,
        },
        {
            "sft.path": "{traces}",
            "task.path": "{data}/gsm8k",
            "sft.steps": 2,
            "sft.held_out": 4,
            "task.eval_count": 4,
            "rollout.max_tokens": 96,
        },
        samples=1,
        count=8,
        about="the same with three steps of 4 problems x 4 samples, to see that it runs",
        traces=True,
        cold_starts=1,
    ),
    "qwen25_7b": Preset(
        "configs/qwen25_7b_math.py",
        "{algorithm}",
        {"task.path": "{data}/train.jsonl", "keep_checkpoints": 1},
        {"sft.path": "{data}/traces.jsonl", "model.source": "{data}/model"},
        samples=32,
        about="the paper's scale, a pod",
        cold_starts=1,
    ),
}
