"""Models that flatten samples and positions, from log to query: OPT's MLPs, the shared experts of Qwen's mixture."""

import json

import pytest
import torch
from cli.conftest import call, write_rows
from integrations import tiny_lm

from logra_kernels.store import GradientStore


def opt(transformers):
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=300,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=128,
            word_embed_proj_dim=32,
        )
    )


def qwen_mixture(transformers):
    return transformers.Qwen2MoeForCausalLM(
        transformers.Qwen2MoeConfig(
            vocab_size=300,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=24,
            num_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=128,
        )
    )


@pytest.mark.parametrize(("make", "flat"), [(opt, "*.fc1"), (qwen_mixture, "*.shared_expert.up_proj")])
def test_logged_and_asked(tmp_path, capsys, make, flat):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = make(transformers).eval()
    model.save_pretrained(tmp_path / "m")
    tiny_lm.tokenizer().save_pretrained(tmp_path / "m")
    texts = tiny_lm.sentences(12, seed=1)
    data = write_rows(tmp_path / "d.jsonl", texts)
    assert call("plan", tmp_path / "m", "--rank", "4", "--batch-size", "2", "--max-length", "16") == 0
    assert call("log", tmp_path / "m", data, "--out", tmp_path / "s", "--rank", "4", "--batch-size", "3") == 0
    assert any(name.endswith(flat[1:]) for name in GradientStore.open(tmp_path / "s").layers)
    capsys.readouterr()
    assert call("query", tmp_path / "s", "--model", tmp_path / "m", "--text", texts[7], "-k", "1", "--json") == 0
    (query,) = json.loads(capsys.readouterr().out)["queries"]
    assert query["rows"][0]["id"] == "r7"
