"""Our architecture under the Auto classes of `transformers`: logits, loss, generation, padding."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from deepseek.config import replace
from deepseek.errors import ConfigError, WeightsError
from deepseek.events import MemorySink, attached
from deepseek.models import ModelConfig, Transformer
from deepseek.nn.attention import AttentionConfig
from deepseek.nn.moe import MoEConfig
from deepseek.weights.convert import load_hf, save_hf

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

import deepseek.transformers as ds_transformers  # noqa: E402

ATTENTION = AttentionConfig(
    heads=4, kv_heads=2, head_dim=8, qk_norm=True, window=6, block=4, stride=2, gate_init=0.0
)
BASE = ModelConfig(
    vocab_size=53, hidden=32, layers=3, ffn=48, pattern="FLH", max_length=128, attention=ATTENTION
)
MOE = MoEConfig(experts=4, top_k=2, expert_ffn=16, shared_experts=1)
SHAPES = {
    "every kind": replace(BASE, ffn_pattern="DEE", moe=MOE),
    "static gate": replace(BASE, pattern="HHL", attention=replace(ATTENTION, gate="static")),
    "no default outputs": replace(BASE, moe=replace(MOE, default_decay=0.0, shared_experts=0)),
    "untied, biases": replace(
        BASE, tie_embeddings=False, ffn_bias=True, attention=replace(ATTENTION, bias=True, output_bias=True)
    ),
    "windows only": replace(BASE, pattern="L"),
}


def make(shape, seed=0):
    """Every parameter and every statistic is away from its initial value."""
    torch.manual_seed(seed)
    model = Transformer(shape).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for moe in model.moe_layers().values():
        moe.router.bias.uniform_(-0.1, 0.1)
        if shape.moe.default_decay:
            moe.default_EC.normal_()
    return model


def tokens(rows=2, length=19, seed=0):
    return torch.randint(6, 53, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model, ids):
    return model.logits(model(ids).hidden)


def greedy(model, ids, steps):
    """Decoding without any cache: the reference."""
    for _ in range(steps):
        ids = torch.cat((ids, logits(model, ids)[:, -1:].argmax(-1)), 1)
    return ids


@pytest.fixture(params=SHAPES)
def pair(request, tmp_path):
    """Our model, and what plain Auto classes make of its directory."""
    ours = make(SHAPES[request.param], seed=len(request.param))
    exported = save_hf(ours, tmp_path / "m", max_shard_bytes=30_000, family="deepseek_hybrid")
    assert exported.model_type == "deepseek_hybrid"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    return ours, theirs, tmp_path / "m"


@pytest.fixture
def both(tmp_path):
    ours = make(SHAPES["every kind"])
    save_hf(ours, tmp_path / "m")
    return ours, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")


def test_equal_logits_and_greedy_generation(pair):
    ours, theirs, _ = pair
    ids = tokens()
    assert isinstance(theirs, ds_transformers.DeepseekHybridForCausalLM)
    torch.testing.assert_close(theirs(ids).logits, logits(ours, ids), rtol=0, atol=1e-5)
    expected = greedy(ours, ids, 16)
    assert torch.equal(theirs.generate(ids, max_new_tokens=16), expected)
    assert torch.equal(theirs.generate(ids, max_new_tokens=16, use_cache=False), expected)


def test_save_pretrained_and_back(pair, tmp_path):
    ours, theirs, _ = pair
    theirs.save_pretrained(tmp_path / "again")
    back = load_hf(tmp_path / "again")
    assert back.config == ours.config
    assert back.state_dict().keys() == ours.state_dict().keys()
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in ours.state_dict().items())


def test_left_padding_equals_rows_alone(pair):
    ours, theirs, _ = pair
    rows = [tokens(1, n, seed=n)[0] for n in (19, 7, 12)]
    ids, mask = torch.ones(3, 19, dtype=torch.long), torch.zeros(3, 19, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, 19 - len(row) :], mask[i, 19 - len(row) :] = row, 1
    plain = theirs(ids, attention_mask=mask, use_cache=False).logits
    cached = theirs(ids, attention_mask=mask, use_cache=True).logits
    out = theirs.generate(ids, attention_mask=mask, max_new_tokens=14)
    slow = theirs.generate(ids, attention_mask=mask, max_new_tokens=14, use_cache=False)
    for i, row in enumerate(rows):
        alone = logits(ours, row[None])[0]
        torch.testing.assert_close(plain[i, 19 - len(row) :], alone, rtol=0, atol=1e-5)
        torch.testing.assert_close(cached[i, 19 - len(row) :], alone, rtol=0, atol=1e-5)
        expected = greedy(ours, row[None], 14)[0]
        assert torch.equal(out[i, 19 - len(row) :], expected)
        assert torch.equal(slow[i, 19 - len(row) :], expected)


def test_right_padding_equals_rows_alone_and_is_refused_for_generation(both):
    ours, theirs = both
    ids, mask = tokens(2, 15), torch.ones(2, 15, dtype=torch.long)
    mask[1, 9:] = 0
    out = theirs(ids, attention_mask=mask).logits
    torch.testing.assert_close(out[0], logits(ours, ids[:1])[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(out[1, :9], logits(ours, ids[1:, :9])[0], rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="pad prompts on the left"):
        theirs.generate(ids, attention_mask=mask, max_new_tokens=2)


def test_packed_documents(both):
    ours, theirs = both
    a, b = tokens(1, 8, seed=1), tokens(1, 11, seed=2)
    positions = torch.cat((torch.arange(8), torch.arange(11)))[None]
    out = theirs(torch.cat((a, b), 1), position_ids=positions).logits
    torch.testing.assert_close(out[:, :8], logits(ours, a), rtol=0, atol=1e-5)
    torch.testing.assert_close(out[:, 8:], logits(ours, b), rtol=0, atol=1e-5)


def test_caching_by_hand(both):
    ours, theirs = both
    ids = tokens(2, 24)
    first = theirs(ids[:, :9], use_cache=True)
    pieces, cache = [first.logits], first.past_key_values
    for start, end in ((9, 10), (10, 17), (17, 24)):
        out = theirs(ids[:, start:end], past_key_values=cache)
        pieces.append(out.logits)
        cache = out.past_key_values
    assert cache.get_seq_length() == 24
    torch.testing.assert_close(torch.cat(pieces, 1), logits(ours, ids), rtol=0, atol=1e-5)


def test_beam_search_equals_itself_without_cache(both):
    _, theirs = both
    ids, options = tokens(2, 10), {"num_beams": 3, "max_new_tokens": 10}
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    for kwargs in ({}, {"attention_mask": mask}):
        fast = theirs.generate(ids, **options, **kwargs)
        assert torch.equal(fast, theirs.generate(ids, use_cache=False, **options, **kwargs))


def test_sampling_and_return_sequences(both):
    _, theirs = both
    torch.manual_seed(0)
    out = theirs.generate(tokens(2, 8), do_sample=True, num_return_sequences=3, max_new_tokens=5)
    assert out.shape == (6, 13)


def test_loss_and_gradients(both):
    ours, theirs = both
    ids, labels = tokens(2, 16), tokens(2, 16)
    labels[0, :5] = -100
    loss = theirs(ids, labels=labels).loss
    expected = F.cross_entropy(logits(ours, ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(theirs.model.get_parameter(name).grad, parameter.grad)


def test_balance_loss_is_added_while_training(both):
    _, theirs = both
    ids = tokens(2, 16)
    out = theirs.train()(ids, labels=ids)
    plain = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert out.aux_loss > 0
    torch.testing.assert_close(out.loss, plain + out.aux_loss)


def test_logits_to_keep_and_tuples(both):
    ours, theirs = both
    ids = tokens()
    torch.testing.assert_close(theirs(ids, logits_to_keep=3).logits, logits(ours, ids)[:, -3:])
    loss, kept = theirs(ids, labels=ids, return_dict=False)[:2]
    assert loss.dim() == 0
    assert kept.dim() == 3 or kept.dim() == 0


def test_bf16(tmp_path):
    ours = make(SHAPES["every kind"])
    save_hf(ours, tmp_path / "m", dtype=torch.bfloat16)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert theirs.dtype == torch.bfloat16
    router = theirs.model.moe_layers()[1].router
    assert router.bias.dtype == torch.float32
    assert torch.equal(router.bias, ours.moe_layers()[1].router.bias)
    ids = tokens()
    torch.testing.assert_close(theirs(ids).logits, logits(load_hf(tmp_path / "m"), ids))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"inputs_embeds": torch.zeros(1, 4, 32)}, "inputs_embeds"),
        ({"output_attentions": True}, "output_attentions"),
        ({"past_key_values": object()}, "past_key_values is a object"),
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, "attention_mask is"),
        ({"position_ids": torch.tensor([[3, 4, 5, 6]])}, "position_ids"),
    ],
)
def test_refusals(both, options, words):
    with pytest.raises(ConfigError, match=words):
        both[1](tokens(1, 4), **options)


def test_more_refusals(both):
    _, theirs = both
    for refused in (
        lambda: theirs.resize_token_embeddings(60),
        lambda: theirs.generate(tokens(), max_new_tokens=2, cache_implementation="static"),
        lambda: theirs.generate(tokens(1), max_new_tokens=4, prompt_lookup_num_tokens=2),
    ):
        with pytest.raises(ConfigError):
            refused()


def test_missing_tensors_are_not_made_up(tmp_path):
    save_hf(make(SHAPES["static gate"]), tmp_path / "m")
    path = tmp_path / "m/config.json"
    values = json.loads(path.read_text())
    values["model"]["layers"] = 4
    path.write_text(json.dumps(values))
    with pytest.raises(WeightsError, match=r"missing keys: model\.blocks\.3"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    with pytest.raises(WeightsError, match="missing"):
        ds_transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")


def test_config_alone(tmp_path):
    config = ds_transformers.DeepseekHybridConfig.of(BASE)
    config.save_pretrained(tmp_path)
    again = transformers.AutoConfig.from_pretrained(tmp_path)
    assert again.shape == BASE
    assert (again.hidden_size, again.num_hidden_layers, again.vocab_size) == (32, 3, 53)
    model = transformers.AutoModelForCausalLM.from_config(again)
    assert sum(p.numel() for p in model.parameters()) == sum(
        p.numel() for p in Transformer(BASE).parameters()
    )
    with pytest.raises(ConfigError, match="unknown key 'hiddn'"):
        ds_transformers.DeepseekHybridConfig(model={"hiddn": 3})


SMALL = {
    "vocab_size": 53, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


class TestOurAuto:
    """`deepseek.transformers.AutoModelForCausalLM`: our layers where they express the model."""

    def save(self, model_type, directory, **options):
        torch.manual_seed(1)
        config = transformers.AutoConfig.for_model(model_type, **{**SMALL, **options})
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(directory)
        return model

    @pytest.mark.parametrize(
        ("model_type", "options"),
        [("llama", {}), ("qwen3", {"head_dim": 8}), ("mixtral", {"num_local_experts": 4})],
    )
    def test_families_run_on_our_layers(self, model_type, options, tmp_path):
        reference = self.save(model_type, tmp_path, **options)
        with attached(sink := MemorySink()):
            model = ds_transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path))
        assert model.runs_on == "deepseek"
        assert sink.series("load", "runs_on") == ["deepseek"]
        ids = tokens()
        torch.testing.assert_close(model(ids).logits, reference(ids).logits, rtol=0, atol=1e-5)
        expected = reference.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), expected)

    def test_the_rest_runs_on_transformers_and_says_why(self, tmp_path):
        scaled = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
        reference = self.save("llama", tmp_path / "a", rope_parameters=scaled)
        model = ds_transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
        assert model.runs_on.startswith("transformers: config.json: rope_parameters")
        torch.testing.assert_close(model(tokens()).logits, reference(tokens()).logits)
        self.save("gpt_neox", tmp_path / "b")
        model = ds_transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
        assert "gpt_neox" in model.runs_on

    def test_what_is_no_model(self, tmp_path):
        for name, words in ((tmp_path, "no config.json"), (tmp_path / "x", "not there")):
            with pytest.raises(WeightsError, match=words):
                ds_transformers.AutoModelForCausalLM.from_pretrained(name)
        (tmp_path / "config.json").write_text('{"model_type": "unheard_of"}')
        with pytest.raises(WeightsError, match="unheard_of"):
            ds_transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        with pytest.raises(WeightsError, match="neither a directory nor a model"):
            ds_transformers.AutoModelForCausalLM.from_pretrained("no/such", local_files_only=True)

    def test_names_that_are_not_there_yet(self):
        with pytest.raises(AttributeError, match="has no 'T5ForConditionalGeneration'; it has: AutoConfig"):
            ds_transformers.T5ForConditionalGeneration
        with pytest.raises(AttributeError, match="has no 'Nonsense'"):
            ds_transformers.Nonsense


def test_without_transformers_the_extra_is_named():
    code = (
        "import importlib.util as u, sys\n"
        "real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'transformers' else real(name, *a)\n"
        "try:\n    import deepseek.transformers\n"
        "except ImportError as e:\n    print(type(e).__name__, e)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.startswith("MissingExtraError deepseek.transformers needs the package 'transformers'")
    assert "deepseek-framework[hf]" in out


def test_conversion_does_not_import_transformers():
    code = "import deepseek.weights.convert, sys; print('transformers' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
