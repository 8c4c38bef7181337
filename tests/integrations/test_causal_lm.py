"""Batches, the loss against transformers' own, greedy text against generate(), and loading errors."""

import json
import shutil

import pytest
import torch
from integrations import tiny_lm

from logra_kernels.errors import LograError
from logra_kernels.integrations import causal_lm
from logra_kernels.integrations.causal_lm import IGNORED, Batch, encode

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tiny_lm.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(saved):
    return causal_lm.load(saved)


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def _load_error(path):
    with pytest.raises(LograError) as caught:
        causal_lm.load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_load_gives_the_saved_weights_in_eval_mode(loaded):
    model, tokenizer = loaded
    assert not model.training
    assert tokenizer.bos_token_id == 0
    for name, value in tiny_lm.model().state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_load_casts_to_a_dtype(saved):
    model, _ = causal_lm.load(saved, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_load_errors(copy, tmp_path):
    assert "does not exist" in _load_error(tmp_path / "absent")
    assert "no config.json" in _load_error(tmp_path)
    for file in copy.glob("*token*"):
        file.unlink()
    assert "no usable tokenizer" in _load_error(copy)


def test_load_refuses_weights_that_are_not_whole(copy):
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight" in _load_error(copy)
    (copy / "model.safetensors").write_bytes(b"nothing")
    assert "cannot load" in _load_error(copy)
    (copy / "model.safetensors").unlink()
    assert "cannot load" in _load_error(copy)


def test_load_refuses_an_unknown_model_type(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "no-such-model"}))
    assert str(copy) in _load_error(copy)


def test_load_refuses_a_tokenizer_with_more_tokens_than_the_model(copy):
    tokenizer = tiny_lm.tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(300)])
    tokenizer.save_pretrained(copy)
    assert "300" in _load_error(copy)


def test_encode_pads_right_and_predicts_every_token_after_bos(loaded):
    _, tokenizer = loaded
    batch = encode(tokenizer, ["the cat", "the cat sat on the mat"])
    short = tokenizer.encode("the cat", add_special_tokens=False)
    count = len(short) + 1
    assert batch.input_ids[0, :count].tolist() == [0, *short]
    assert batch.labels[0, :count].tolist() == [IGNORED, *short]
    assert batch.attention_mask[0].tolist() == [1] * count + [0] * (batch.input_ids.shape[1] - count)
    assert (batch.labels[0, count:] == IGNORED).all()
    assert len(batch) == 2


def test_encode_cuts_long_texts_at_their_end_and_prompts_at_their_beginning(loaded):
    _, tokenizer = loaded
    prompt, completion = "the cat sat on the mat and", " then slept"
    whole = tokenizer.encode(prompt + completion, add_special_tokens=False)
    assert encode(tokenizer, [prompt + completion], max_length=4).input_ids[0].tolist() == [0, *whole[:3]]
    cut = encode(tokenizer, [prompt], completions=[completion], max_length=6)
    assert cut.input_ids[0].tolist() == [0, *whole[-5:]]
    answer = tokenizer.encode(completion, add_special_tokens=False)
    assert cut.labels[0][cut.labels[0] != IGNORED].tolist() == answer


@pytest.mark.parametrize(
    ("prompt", "completion"), [("the ca", "t sat"), ("the cat", " sat"), ("", "the cat"), ("a ", "b")]
)
@pytest.mark.parametrize("bos", [True, False])
def test_encode_predicts_the_completion_alone(prompt, completion, bos):
    tokenizer = tiny_lm.tokenizer(bos)
    batch = encode(tokenizer, [prompt], completions=[completion])
    whole = ([0] if bos else []) + tokenizer.encode(prompt + completion, add_special_tokens=False)
    assert batch.input_ids[0].tolist() == whole
    predicted = [token for token in batch.labels[0].tolist() if token != IGNORED]
    assert whole[len(whole) - len(predicted) :] == predicted
    given = tokenizer.decode(whole[: len(whole) - len(predicted)], skip_special_tokens=True)
    # A token that spans both is predicted, so that what is given never reaches into the completion.
    assert prompt.startswith(given) or (not bos and prompt == "")


def test_encode_without_bos_does_not_predict_the_first_token():
    tokenizer = tiny_lm.tokenizer(bos=False)
    tokens = tokenizer.encode("the cat sat", add_special_tokens=False)
    assert encode(tokenizer, ["the cat sat"]).labels[0].tolist() == [IGNORED, *tokens[1:]]


@pytest.mark.parametrize(
    ("bos", "text", "completions"), [(True, "", None), (False, "t", None), (True, "the cat", [""])]
)
def test_encode_names_a_text_without_predicted_tokens(bos, text, completions):
    tokenizer = tiny_lm.tokenizer(bos)
    with pytest.raises(LograError, match="row-9 has no token to predict"):
        encode(tokenizer, [text], completions=completions, ids=["row-9"])


@pytest.mark.parametrize(("text", "completions"), [("abc \ud83d def", None), ("abc ", ["\ud83d def"])])
def test_encode_names_a_text_with_half_of_a_surrogate_pair(loaded, text, completions):
    model, tokenizer = loaded
    with pytest.raises(LograError, match=r"^row-9: its text holds half of a surrogate pair \(\\ud83d, character 5\)"):
        encode(tokenizer, [text], completions=completions, ids=["row-9"])
    with pytest.raises(LograError, match="the prompt holds half of a surrogate pair"):
        causal_lm.continue_greedy(model, tokenizer, "abc \ud83d def", 3)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("completions", [None, [" a dog", " a dog"]])
def test_encode_says_which_texts_were_cut(bos, completions):
    tokenizer = tiny_lm.tokenizer(bos)
    texts = ["the cat", "the cat sat on the mat near the old red house"]
    whole = encode(tokenizer, texts, completions=completions, max_length=64)
    length = int(whole.attention_mask[1].sum())
    assert whole.cut == (False, False)
    assert encode(tokenizer, texts, completions=completions, max_length=length).cut == (False, False)
    cut = encode(tokenizer, texts, completions=completions, max_length=length - 1)
    assert cut.cut == (False, True)
    assert cut.attention_mask[1].sum() == length - 1
    assert cut.select([1]).cut == cut.to("cpu").select([1]).cut == (True,)
    parts = list(causal_lm.batches_of_like_length(tokenizer, texts, 1, completions=completions, max_length=length - 1))
    assert [(places, part.cut) for places, part in parts] == [([1], (True,)), ([0], (False,))]


def test_encode_checks_lengths(loaded):
    _, tokenizer = loaded
    with pytest.raises(ValueError, match="2 texts but 1 completions"):
        encode(tokenizer, ["a", "b"], completions=["c"])
    with pytest.raises(ValueError, match="1 texts but 2 ids"):
        encode(tokenizer, ["a"], ids=["b", "c"])
    with pytest.raises(ValueError, match="max_length 1"):
        encode(tokenizer, ["a"], max_length=1)


def test_losses_are_sums_and_do_not_depend_on_the_batch(loaded):
    model, tokenizer = loaded
    texts = tiny_lm.sentences(5, seed=3)
    nll, tokens = causal_lm.losses(model, encode(tokenizer, texts))
    for i, text in enumerate(texts):
        one = encode(tokenizer, [text])
        mean = model(input_ids=one.input_ids, labels=one.input_ids).loss
        assert int(tokens[i]) == one.input_ids.shape[1] - 1
        torch.testing.assert_close(nll[i], mean * tokens[i], rtol=1e-5, atol=0)
    torch.testing.assert_close(causal_lm.loss_sum(model, encode(tokenizer, texts)), nll.sum())


def test_loss_of_a_completion_is_the_difference_of_two_texts(loaded):
    model, tokenizer = loaded
    prompt, completion = "the cat sat", " on the mat"
    whole = causal_lm.loss_sum(model, encode(tokenizer, [prompt + completion]))
    given = causal_lm.loss_sum(model, encode(tokenizer, [prompt]))
    part = causal_lm.loss_sum(model, encode(tokenizer, [prompt], completions=[completion]))
    torch.testing.assert_close(part, whole - given, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (float("inf"), "NaN")])
def test_a_loss_that_is_not_finite_names_the_row(value, kind):
    model, tokenizer = tiny_lm.model(), tiny_lm.tokenizer()
    # The token "y" alone is broken, and only the second text holds it.
    broken = tokenizer.encode("y", add_special_tokens=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[broken] = value
    batch = encode(tokenizer, ["the cat", "y y"], ids=["good", "bad"])
    with pytest.raises(LograError, match=f"loss is {kind} on row bad"):
        causal_lm.loss_sum(model, batch)


def test_batch_moves(loaded):
    _, tokenizer = loaded
    moved = encode(tokenizer, ["the cat"], ids=["a"]).to("meta")
    assert isinstance(moved, Batch)
    assert moved.labels.device.type == "meta"
    assert moved.ids == ("a",)


def test_greedy_continuation_is_what_generate_writes(loaded):
    model, tokenizer = loaded
    prompt = "the cat sat"
    tokens = torch.tensor([[0, *tokenizer.encode(prompt, add_special_tokens=False)]])
    written = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=12, pad_token_id=1
    )
    expected = tokenizer.decode(written[0, tokens.shape[1] :], skip_special_tokens=True).rstrip(
        "\N{REPLACEMENT CHARACTER}"
    )
    assert causal_lm.continue_greedy(model, tokenizer, prompt, 12) == expected


def test_greedy_continuation_errors(loaded):
    model, tokenizer = loaded
    with pytest.raises(LograError, match="128 positions"):
        causal_lm.continue_greedy(model, tokenizer, "the cat", 126)
    with pytest.raises(LograError, match="no tokens"):
        causal_lm.continue_greedy(model, tiny_lm.tokenizer(bos=False), "", 3)


def test_batches_of_like_length_hold_what_encode_gives_of_their_texts(loaded):
    _, tokenizer = loaded
    texts = ["the cat", "the dog sat on a mat near the river", "a bird", "the cat sat on the mat", "old"]
    lengths = [len(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    batches = list(causal_lm.batches_of_like_length(tokenizer, texts, 2, max_length=8, ids=list("abcde")))
    order = [i for places, _ in batches for i in places]
    assert order == sorted(range(5), key=lambda i: -min(lengths[i] + 1, 8))
    assert [len(batch) for _, batch in batches] == [2, 2, 1]
    for places, batch in batches:
        alone = encode(tokenizer, [texts[i] for i in places], max_length=8, ids=["abcde"[i] for i in places])
        for name in ("input_ids", "attention_mask", "labels"):
            assert torch.equal(getattr(batch, name), getattr(alone, name))
        assert batch.ids == alone.ids
    with pytest.raises(LograError, match="b has no token"):
        next(causal_lm.batches_of_like_length(tokenizer, ["the cat", ""], 2, ids=["a", "b"]))


def test_some_samples_of_a_batch(loaded):
    _, tokenizer = loaded
    batch = encode(tokenizer, ["the cat", "the cat sat on the mat", "a dog"], ids=["a", "b", "c"])
    some = batch.select([2, 0])
    assert some.ids == ("c", "a")
    assert torch.equal(some.labels, batch.labels[[2, 0]])
    assert some.sequence_length == batch.sequence_length
    assert len(batch.select([])) == 0
