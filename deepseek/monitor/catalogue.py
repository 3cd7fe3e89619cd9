"""Every metric that a run may have, with its unit, its group, and what it means, in English and Chinese.

One list for the dashboard, the docs and Prometheus. ``describe(name)`` finds the entry of a series; a series that
a user named has none. In a pattern ``{layer}``, ``{head}``, ``{expert}`` and ``{rank}`` stand for numbers from 0 (a
layer may also be ``embedding`` or ``head``), ``{source}`` for a source of data.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

Better = Literal["lower", "higher", ""]


@dataclass(frozen=True)
class Metric:
    """What is known of the series that fit ``pattern``.

    Attributes:
        unit: 's', 'bytes', 'tokens', 'share' (0 to 1), 'nats', ...; empty: a plain number.
        better: which way is good, where there is one.
    """

    pattern: str
    unit: str
    en: str
    zh: str
    better: Better = ""

    @property
    def group(self) -> str:
        """The first part of the name."""
        return self.pattern.split("/", 1)[0]

    @property
    def expression(self) -> re.Pattern[str]:
        """Matches the names; a group for each placeholder."""
        parts = re.split(r"\{(\w+)\}", self.pattern)
        fixed = [re.escape(part) for part in parts[::2]]
        holes = [f"(?P<{name}>{_PLACES[name]})" for name in parts[1::2]]
        return re.compile("".join(x for pair in zip(fixed, [*holes, ""]) for x in pair))

    def labels(self, name: str) -> dict[str, str]:
        """What the placeholders stand for in a name: ``{"layer": "3", "expert": "17"}``."""
        found = self.expression.fullmatch(name)
        return found.groupdict() if found else {}

    def to_dict(self) -> dict[str, Any]:
        """As the dashboard's API gives it."""
        return {
            "pattern": self.pattern, "group": self.group, "unit": self.unit, "better": self.better,
            "description": {"en": self.en, "zh": self.zh},
        }  # fmt: skip


_PLACES = {"layer": r"\d+|embedding|head", "head": r"\d+", "expert": r"\d+", "rank": r"\d+", "source": r".+"}

#: The groups in the order of a page, with their titles.
GROUPS: Mapping[str, tuple[str, str]] = {
    "train": ("Training", "训练"),
    "eval": ("Held-out text", "留出文本"),
    "time": ("Where the time of a step goes", "每步时间的去向"),
    "memory": ("Memory", "内存"),
    "layer": ("Layers", "层"),
    "attention": ("Attention heads", "注意力头"),
    "router": ("Routers", "路由器"),
    "expert": ("Experts", "专家"),
    "rank": ("Ranks", "各进程"),
    "data": ("Data by source", "按来源的数据"),
    "precision": ("Precision", "数值精度"),
}

METRICS: tuple[Metric, ...] = (
    Metric("train/loss", "nats/token", "Mean cross-entropy of the step's batch, without any penalty.",
           "本步批次的平均交叉熵，不含任何惩罚项。", "lower"),
    Metric("train/bits_per_byte", "bits/byte", "The loss per byte of text: comparable between tokenizers.",
           "按文本字节计的损失：不同分词器之间可以比较。", "lower"),
    Metric("train/balance_loss", "", "What is added to the loss to keep experts balanced, and other penalties.",
           "为使专家均衡而加到损失上的部分，以及其他惩罚项。"),
    Metric("train/grad_norm", "", "Euclidean norm of all gradients before clipping.",
           "裁剪之前全部梯度的欧几里得范数。"),
    Metric("train/lr", "", "Learning rate of the step.", "本步的学习率。"),
    Metric("train/tokens", "tokens", "Targets counted in the step, over all ranks.",
           "本步计入的目标词元数，所有进程合计。"),
    Metric("train/tokens_per_second", "tokens/s", "Targets of the step by its wall time.",
           "本步目标词元数除以实际用时。", "higher"),
    Metric("train/mfu", "share", "Model FLOPs utilisation: the model's arithmetic against the measured peak.",
           "模型算力利用率：模型所需运算与实测峰值之比。", "higher"),
    Metric("train/clipped", "share", "1 when the gradients were scaled down.", "梯度被缩小时为 1。"),
    Metric("train/skipped", "share", "1 when the step was not applied, for a loss or gradient that was not finite.",
           "因损失或梯度非有限而未执行更新时为 1。", "lower"),
    Metric("train/router_entropy", "nats", "Mean entropy of the routers' choice of experts, over layers.",
           "各层路由器选择专家的平均熵。"),
    Metric("train/max_vio", "", "Mean over layers of (largest load − mean load) / mean load (arXiv 2408.15664).",
           "各层（最大负载 − 平均负载）/ 平均负载的均值（arXiv 2408.15664）。", "lower"),
    Metric("train/coverage", "share", "Mean over layers of Σ min(load, 1/E): 1 when all experts are used equally.",
           "各层 Σ min(负载, 1/E) 的均值：所有专家使用均等时为 1。", "higher"),
    Metric("eval/loss", "nats/token", "Mean cross-entropy on held-out text.", "留出文本上的平均交叉熵。", "lower"),
    Metric("eval/bits_per_byte", "bits/byte", "Held-out loss per byte of text.", "留出文本每字节的损失。", "lower"),
    Metric("eval/tokens", "tokens", "Targets that the evaluation counted.", "评估计入的目标词元数。"),
    Metric("eval/bytes", "bytes", "Bytes of text that the evaluation counted.", "评估计入的文本字节数。"),
    Metric("eval/seconds", "s", "How long the evaluation took.", "评估用时。", "lower"),
    Metric("time/step", "s", "The whole step.", "整个训练步。", "lower"),
    Metric("time/data", "s", "Waiting for the next batch.", "等待下一个批次。", "lower"),
    Metric("time/compute", "s", "Forward, backward and update of an accelerator, which are not told apart.",
           "加速器的前向、反向与更新，合并计时。", "lower"),
    Metric("time/forward", "s", "Forward passes and loss.", "前向计算与损失。", "lower"),
    Metric("time/backward", "s", "Backward passes.", "反向计算。", "lower"),
    Metric("time/optimizer", "s", "Clipping and the optimizer's update.", "梯度裁剪与优化器更新。", "lower"),
    Metric("time/communication", "s", "Waiting for other ranks.", "等待其他进程。", "lower"),
    Metric("time/other", "s", "What no other part accounts for.", "其余未归类的时间。", "lower"),
    Metric("memory/weights", "bytes", "Parameters and buffers of the model.", "模型的参数与缓冲。"),
    Metric("memory/gradients", "bytes", "Gradients.", "梯度。"),
    Metric("memory/optimizer", "bytes", "Optimizer state and master weights.", "优化器状态与主权重。"),
    Metric("memory/activations", "bytes", "What is kept for the backward pass, workspace included on a GPU.",
           "为反向计算保留的数据，在 GPU 上含工作区。"),
    Metric("memory/allocated", "bytes", "Handed out by the allocator at the moment.", "分配器当前已分配的内存。"),
    Metric("memory/reserved", "bytes", "Held by the allocator, in use or not.", "分配器占有的内存，无论是否使用。"),
    Metric("memory/rss", "bytes", "Resident memory of the process on the host.", "进程在主机上的常驻内存。"),
    Metric("layer/{layer}/grad_norm", "", "Norm of the gradients of this layer's weights, before clipping.",
           "该层权重梯度在裁剪前的范数。"),
    Metric("layer/{layer}/weight_norm", "", "Norm of this layer's weights.", "该层权重的范数。"),
    Metric("layer/{layer}/update_ratio", "", "Size of the last update by that of the weights; about 1e-3 is usual.",
           "最近一次更新与权重大小之比；通常约为 1e-3。"),
    Metric("layer/{layer}/activation_rms", "", "Root mean square of what leaves the layer.", "该层输出的均方根。"),
    Metric("layer/{layer}/activation_max", "", "Largest magnitude of what leaves the layer.",
           "该层输出的最大绝对值。"),
    Metric("layer/{layer}/dead_units", "share", "Units of the feed-forward that answer to no token of the sample.",
           "前馈层中对样本的任何词元都没有响应的单元比例。", "lower"),
    Metric("attention/{layer}/{head}/gate", "share", "Mean gate of a hybrid head: 1 looks far, 0 looks near.",
           "混合注意力头的平均门控：1 看全局，0 看窗口。"),
    Metric("attention/{layer}/{head}/entropy", "nats", "Mean entropy of the head's attention.",
           "该头注意力分布的平均熵。"),
    Metric("attention/{layer}/{head}/sink", "share", "Attention that falls on the first token.",
           "落在首个词元上的注意力比例。"),
    Metric("attention/{layer}/{head}/max_logit", "", "Largest score of query and key before the softmax.",
           "softmax 之前查询与键的最大得分。", "lower"),
    Metric("attention/{layer}/{head}/output_norm", "", "Mean norm of what the head adds.", "该头输出的平均范数。"),
    Metric("router/{layer}/entropy", "nats", "Mean entropy of this router's choice of experts.",
           "该路由器选择专家的平均熵。"),
    Metric("router/{layer}/max_vio", "", "(Largest load − mean load) / mean load of this layer (arXiv 2408.15664).",
           "该层（最大负载 − 平均负载）/ 平均负载（arXiv 2408.15664）。", "lower"),
    Metric("router/{layer}/dead", "experts", "Experts that get almost no tokens.",
           "几乎得不到词元的专家数。", "lower"),
    Metric("router/{layer}/coverage", "share", "Σ min(load, 1/E) of this layer: 1 when all experts are used equally.",
           "该层的 Σ min(负载, 1/E)：所有专家使用均等时为 1。", "higher"),
    Metric("expert/{layer}/{expert}/load", "share", "Share of the layer's choices that fell on the expert.",
           "该层的选择中落在该专家上的比例。"),
    Metric("expert/{layer}/{expert}/bias", "", "What balancing adds to the expert's score when experts are selected.",
           "选择专家时均衡机制加到该专家得分上的偏置。"),
    Metric("expert/{layer}/{expert}/weight_norm", "", "Norm of the expert's weights.", "该专家权重的范数。"),
    Metric("expert/{layer}/{expert}/dead_units", "share", "Its units that answer to none of the tokens it likes best.",
           "专家中对其最偏好的词元都没有响应的单元比例。", "lower"),
    Metric("rank/{rank}/step_seconds", "s", "The rank's own time of a step, without waiting for others.",
           "该进程自身的每步用时，不含等待其他进程的时间。", "lower"),
    Metric("rank/{rank}/data_seconds", "s", "The rank's time waiting for data.", "该进程等待数据的时间。", "lower"),
    Metric("rank/{rank}/memory", "bytes", "Memory in use on the rank's device.", "该进程所用设备的已用内存。"),
    Metric("data/{source}/loss", "nats/token", "Mean loss on the tokens of this source.",
           "该来源词元上的平均损失。", "lower"),
    Metric("data/{source}/share", "share", "This source's share of the stream.", "该来源在数据流中的比例。"),
    Metric("data/{source}/length", "tokens", "Mean length of its documents.", "该来源文档的平均长度。"),
    Metric("data/{source}/entropy", "bits", "Entropy of its tokens: low for repetition, high for noise.",
           "该来源词元的熵：重复文本偏低，噪声偏高。"),
    Metric("data/{source}/duplicates", "share", "Documents that were seen before.",
           "此前已出现过的文档比例。", "lower"),
    Metric("data/{source}/language", "share", "Pieces in its commonest language, of the last 64 that were told.",
           "最近识别的 64 个片段中，属于该来源最常见语言的比例。"),
    Metric("data/{source}/psi", "", "How far it is from the start of the run; 0.25 is the limit of what is healthy.",
           "与运行开始时的偏离程度（群体稳定性指数）；0.25 为健康上限。", "lower"),
    Metric("precision/loss_scale", "", "What losses are multiplied by before the backward pass.",
           "反向计算之前损失所乘的系数。"),
    Metric("precision/nonfinite", "steps", "Steps so far whose loss or gradient was not finite.",
           "迄今损失或梯度非有限的步数。", "lower"),
    Metric("precision/switches", "", "How often the precision was changed so far.", "迄今切换数值精度的次数。"),
)  # fmt: skip

_EXACT = {metric.pattern: metric for metric in METRICS if "{" not in metric.pattern}
_OPEN = [(metric.expression, metric) for metric in METRICS if "{" in metric.pattern]


@lru_cache(maxsize=1 << 16)
def describe(name: str) -> Metric | None:
    """The entry of a series, or ``None`` if a user named it."""
    if name in _EXACT:
        return _EXACT[name]
    return next((metric for expression, metric in _OPEN if expression.fullmatch(name)), None)


def group_of(name: str) -> str:
    """The group of any series: that of its entry, else the first part of its name; 'other' if it has only one."""
    metric = describe(name)
    if metric is not None:
        return metric.group
    return name.split("/", 1)[0] if "/" in name else "other"


def catalogue() -> dict[str, Any]:
    """Groups and metrics as the dashboard's API gives them."""
    groups = [{"name": name, "title": {"en": en, "zh": zh}} for name, (en, zh) in GROUPS.items()]
    return {"groups": groups, "metrics": [metric.to_dict() for metric in METRICS]}


def markdown(language: Literal["en", "zh"] = "en") -> str:
    """The catalogue as tables, for the docs."""
    heads = {"en": "| series | unit | what it is |", "zh": "| 名称 | 单位 | 含义 |"}
    lines = []
    for group, titles in GROUPS.items():
        lines += [f"### {titles[language == 'zh']}", "", heads[language], "|---|---|---|"]
        lines += [
            f"| `{m.pattern}` | {m.unit} | {m.zh if language == 'zh' else m.en} |"
            for m in METRICS
            if m.group == group
        ]
        lines.append("")
    return "\n".join(lines)


def page() -> str:
    """``docs/metrics.md``."""
    holes = "In a name `{layer}`, `{head}`, `{expert}` and `{rank}` stand for numbers from 0 (a layer may also be "
    return (
        "# Metrics\n\n"
        "Every series that a run of this package may keep. The dashboard, this page and Prometheus have it from one "
        "list, `deepseek.monitor.catalogue`.\n\n"
        f"{holes}`embedding` or `head`), `{{source}}` for a source of data. A share lies between 0 and 1. What you log "
        "yourself keeps the name that you give it.\n\n"
        f"{markdown('en').replace('### ', '## ')}\n"
        "## 中文\n\n"
        "名称中的 `{layer}`、`{head}`、`{expert}`、`{rank}` 是从 0 开始的编号（层也可以是 `embedding` 或 `head`），"
        "`{source}` 是数据来源。share 表示 0 到 1 之间的比例。\n\n"
        f"{markdown('zh')}"
    )


if __name__ == "__main__":
    print(page(), end="")
