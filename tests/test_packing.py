"""Packed rows against one forward pass a response: the same log-probs and gradients, whatever the model attends to."""

import copy
import random
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from as_on_gpus import attention_as_on_gpus, standing_in_for_the_kernel
from plain_model import response_logp
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    DogeConfig,
    Gemma2Config,
    Gemma3TextConfig,
    Lfm2Config,
    Lfm2VlConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2MoeConfig,
    Qwen3Config,
)
from verl.utils import tensordict_utils as tu
from verl.workers.config import FSDPEngineConfig
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from recipe.spin.engine import attention, kernels
from recipe.spin.engine.logps import (
    response_values,
    response_weights,
    token_entropies,
    token_log_expected_probs,
    token_logps,
)
from recipe.spin.engine.packing import common_beginning, copy_prompts, pack_rows, split_copies
from recipe.spin.engine.row_engine import SeparateEngine
from recipe.spin.engine.rows import make_rows, nest, row_lists

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "initializer_range": 0.3,
}
WINDOW = 5
MODELS = {
    "grouped queries": LlamaConfig(**SIZES),
    "sliding window": MistralConfig(**SIZES, sliding_window=WINDOW),
    "norms of queries": Qwen3Config(**SIZES),
    "capped scores, every other layer a window": Gemma2Config(
        **SIZES, sliding_window=WINDOW, attn_logit_softcapping=2.0, final_logit_softcapping=5.0, query_pre_attn_scalar=8
    ),
    "windows with rotations of their own": Gemma3TextConfig(
        **SIZES,
        sliding_window=WINDOW,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
}


def build(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager").eval()


def draw_rows(seed: int, rows: int = 4, beginning: int = 3) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Prompts of very different lengths that begin alike, with 1 to 8 responses, some of them empty."""
    draw = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return draw.choices(range(2, 60), k=draw.randint(low, high))

    start = tokens(beginning, beginning)
    prompts = [start + tokens(0 if beginning else 1, 30 if row % 2 else 3) for row in range(rows)]
    answers = [[tokens(0, 9) for _ in range(8 if row == 0 else draw.randint(1, 3))] for row in range(rows)]
    answers[-1][0] = []
    return prompts, answers


def as_rows(prompts, answers):
    return make_rows(
        [torch.tensor(prompt) for prompt in prompts],
        [[torch.tensor(answer, dtype=torch.long) for answer in row] for row in answers],
    )


def pack(prompts, answers, multiple_of: int = 1):
    rows = as_rows(prompts, answers)
    return pack_rows(rows["input_ids"], rows["segments"], multiple_of)


def shared_logps(model, rows, multiple_of: int = 1):
    packed = pack_rows(rows["input_ids"], rows["segments"], multiple_of)
    logits = model(
        input_ids=packed.input_ids[None],
        position_ids=packed.position_ids[None],
        attention_mask=None,
        use_cache=False,
        logits_to_keep=packed.predictors,
        visibility=packed.visibility,
    ).logits[0]
    lengths = [length for _, *answers in row_lists(rows["segments"]) for length in answers]
    mask = torch.ones(len(packed.labels))
    return response_values(token_logps(logits, packed.labels), mask, lengths, average=False)


def standing_in_for_an_older_kernel(query, key, value, *args, scale=None, window_size=(-1, -1)):
    """As torch 2.10 and 2.11 have it: grouped queries are not asked for, and there."""
    assert query.shape[1] > key.shape[1]
    return standing_in_for_the_kernel(query, key, value, *args, scale=scale, window_size=window_size, enable_gqa=True)


@pytest.fixture
def on_an_accelerator():
    with attention_as_on_gpus():
        yield


def compare(name: str, prompts, answers, multiple_of: int = 1) -> None:
    """Log-probs and gradients of all parameters, for one weight a response, against a pass of its own for each."""
    plain, model = build(MODELS[name]), build(MODELS[name])
    attention.check_model_shares_prompts(model)
    model.set_attn_implementation(attention.NAME)
    expected = torch.stack(
        [
            response_logp(plain, prompt, answer, [1] * len(answer), temperature=1.0)
            for prompt, row in zip(prompts, answers, strict=True)
            for answer in row
        ]
    )
    ours = shared_logps(model, as_rows(prompts, answers), multiple_of)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    weights = torch.linspace(-1, 1, len(ours))
    for logps in (ours, expected):
        (logps * weights).sum().backward()
    for (key, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (one.grad - other.grad).norm() <= 1e-5 * other.grad.norm(), key


@pytest.mark.parametrize("name", MODELS)
def test_rows_give_what_single_sequences_give(name):
    compare(name, *draw_rows(0))


@pytest.mark.parametrize("name", MODELS)
def test_an_accelerator_gives_what_single_sequences_give(name, on_an_accelerator, monkeypatch):
    """By segments, but for capped scores, which torch's kernel does not know."""
    other = "attend_by_segment" if "capped" in name else "attend_by_row"
    monkeypatch.setattr(attention, other, None)
    compare(name, *draw_rows(0))


def test_segments_with_a_kernel_that_groups_queries_unasked(on_an_accelerator, monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", standing_in_for_an_older_kernel)
    compare("sliding window", *draw_rows(0))


class Sums(TorchDispatchMode):
    """Records the dtypes in which gradients of gathered tokens are added up."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.index_add_, torch.ops.aten.index_add):
            self.seen.append(args[0].dtype)
        return function(*args, **(kwargs or {}))


def test_gradients_of_what_many_segments_see_are_summed_in_fp32(on_an_accelerator):
    """A GPU adds up in bf16, one segment after the other: 1 % off with 60 segments, 3 % with 500."""
    packed = pack([[5, 6, 7]] * 3, [[[8, 9], [9, 4]]] * 3)
    shape = (1, 2, len(packed.input_ids), 8)
    query, key, value = (torch.randn(shape).bfloat16().requires_grad_() for _ in range(3))
    output, _ = attention.shared_prompt_attention(
        torch.nn.Module(), query, key, value, None, visibility=packed.visibility
    )
    with Sums() as sums:
        output.float().sum().backward()
    assert sums.seen == [torch.float32] * 2 and key.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("accelerator", [False, True])
@pytest.mark.parametrize(
    ("prompts", "answers"),
    [
        ([[5, 6, 7]], [[[8, 9], [9]]]),
        ([[5, 6, 7], [5, 6, 7]], [[[8, 9], [9]], [[4], []]]),  # the same prompt twice: nothing of it is left to a row
        ([[5], [5, 6]], [[[8], [9]], [[4], [3, 2]]]),
        ([[5, 6], [7]], [[[8], [9]], [[4], [3, 2]]]),  # nothing in common
        ([[5, 6]], [[[], []]]),  # no token to predict
    ],
    ids=["one row", "equal prompts", "a prompt within another", "different prompts", "empty responses"],
)
@pytest.mark.parametrize("multiple_of", [1, 8])
def test_rows_of_all_shapes(accelerator, prompts, answers, multiple_of, request):
    if accelerator:
        request.getfixturevalue("on_an_accelerator")
    compare("sliding window", prompts, answers, multiple_of)


def test_rows_of_unequal_lengths_are_not_filled_up():
    """One long prompt among many short ones: filled up, each would cost what the long one does."""
    prompts, answers = [[5] * 40, *[[5, 6]] * 9], [[[7], [8, 9]]] * 10
    assert pack(prompts, answers).visibility.by_row.queries.shape == (1, 78)
    assert pack(prompts[1:], answers[1:]).visibility.by_row.queries.shape == (9, 3)
    compare("sliding window", prompts, answers)


def test_a_token_is_computed_once():
    prompts, answers = [[1, 2, 3, 4], [1, 2, 5]], [[[6, 7], [8]], [[9], [10], [11]]]
    packed = pack(prompts, answers)
    assert packed.input_ids.tolist() == [1, 2, 3, 4, 6, 7, 8, 5, 9, 10, 11]
    assert packed.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 4, 2, 3, 3, 3]
    assert packed.labels.tolist() == [6, 7, 8, 9, 10, 11]
    assert packed.input_ids[packed.predictors].tolist() == [4, 6, 4, 5, 5, 5]
    assert pack(prompts, answers, 4).input_ids.tolist() == [*packed.input_ids.tolist(), 0]


def test_prompts_are_copied_for_models_that_cannot_share():
    rows = as_rows([[1, 2], [3]], [[[4], [5, 6]], [[7]]])
    copied = copy_prompts(rows["input_ids"], rows["segments"])
    assert row_lists(copied) == [[1, 2, 4, 1, 2, 5, 6], [3, 7]]
    sequences, prompts = split_copies(copied, rows["segments"])
    assert [row.tolist() for row in sequences] == [[1, 2, 4], [1, 2, 5, 6], [3, 7]]
    assert prompts == [2, 2, 1]


@pytest.mark.parametrize(
    ("prompts", "expected"), [([[1, 2], [1, 2]], 2), ([[1, 2], [1]], 1), ([[1], [2]], 0), ([[1, 2, 3], [1, 9, 3]], 1)]
)
def test_common_beginning(prompts, expected):
    assert common_beginning([torch.tensor(prompt) for prompt in prompts]) == expected


@pytest.mark.parametrize(("implementation", "same"), [("eager", True), ("sdpa", False)])
def test_separate_prompts_keep_capped_scores_in_eager_attention_alone(implementation, same):
    """transformers' sdpa takes a cap and ignores it, which checks/model_config.py refuses for that."""
    config = MODELS[next(name for name in MODELS if "capped" in name)]
    plain, model = build(config), build(config)
    model.set_attn_implementation(implementation)
    prompts, answers = [[5, 6, 7], [8, 9]], [[[3, 4], [9]], [[4], [2, 6, 7]]]
    engine = SeparateEngine.__new__(SeparateEngine)
    engine.pad_to_length, engine.use_ulysses_sp, engine.enable_routing_replay = None, False, False
    rows = as_rows(prompts, answers)
    rows["input_ids"] = copy_prompts(rows["input_ids"], rows["segments"])
    tu.assign_non_tensor(rows, temperature=1.0, use_remove_padding=True)
    inputs, places = engine.prepare_model_inputs(rows)
    ours = token_logps(model(**inputs, use_cache=False).logits[0], places["labels"]).split([2, 1, 1, 3])
    expected = [
        response_logp(plain, prompt, answer, [1] * len(answer), temperature=1.0)
        for prompt, row in zip(prompts, answers, strict=True)
        for answer in row
    ]
    gap = (torch.stack([one.sum() for one in ours]) - torch.stack(expected)).abs().max()
    assert gap < 1e-4 if same else gap > 1e-2, gap


# ---- The kernel ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("device", "head", "value_head", "softcap", "flash_attn", "expected"),
    [
        ("cuda", 64, 64, None, False, "attend_by_segment"),
        ("cuda", 256, 256, None, False, "attend_by_segment"),
        ("cuda", 512, 512, None, True, "attend_by_row"),  # the global layers of Gemma 4
        ("cuda", 192, 128, None, True, "attend_by_row"),  # DeepSeek-V3
        ("cuda", 100, 100, None, True, "attend_by_row"),
        ("cuda", 256, 256, 50.0, False, "attend_by_row"),  # Gemma 2
        ("cuda", 256, 256, 50.0, True, "attend_by_segment"),
        ("cuda", 512, 512, 50.0, True, "attend_by_row"),
        ("cpu", 64, 64, None, True, "attend_by_row"),
    ],
)
def test_attention_is_chosen_by_what_kernels_take(monkeypatch, device, head, value_head, softcap, flash_attn, expected):
    monkeypatch.setattr(attention, "has_flash_attention_2", lambda: flash_attn)
    assert attention.choose_attention(device, head, value_head, softcap).__name__ == expected


@pytest.mark.parametrize(("device", "heads"), [("cpu", 2), ("meta", 4)])
def test_keys_are_repeated_where_a_mask_leaves_no_kernel_that_groups_queries(monkeypatch, device, heads):
    """On a GPU SDPA would compute all scores one by one and keep them."""
    seen = []

    def product(query, key, value, mask, scale, enable_gqa):
        seen.append((key.shape[1], value.shape[1], enable_gqa))
        return query

    monkeypatch.setattr(attention, "scaled_dot_product_attention", product)
    query, key = (torch.empty(1, 3, number, 8, device=device) for number in (4, 2))
    scoring = attention.Scoring(None, None, None)
    attention._masked_attention(query, key, key, torch.empty(3, 3, dtype=torch.bool, device=device), scoring)
    assert seen == [(heads, heads, heads < 4)]


@pytest.mark.parametrize(
    ("module", "distributions", "expected"),
    [
        (None, {}, False),
        ("a spec", {"flash-attn": "2.8.3"}, True),
        ("a spec", {"flash-attn-4": "4.0.0"}, False),
        ("a spec", {"flash-attn": "4.0.0"}, False),
    ],
)
def test_flash_attention_4_is_not_taken_for_2(monkeypatch, module, distributions, expected):
    def version(name: str) -> str:
        if name not in distributions:
            raise PackageNotFoundError(name)
        return distributions[name]

    monkeypatch.setattr(kernels, "find_spec", lambda name: module)
    monkeypatch.setattr(kernels, "version", version)
    assert kernels.has_flash_attention_2.__wrapped__() is expected


# ---- What cannot share ----------------------------------------------------------------------------------------------
def test_a_model_with_other_layers_is_refused_with_the_way_on():
    model = build(MODELS["grouped queries"])
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ValueError, match="linear_attention.*actor_rollout_ref.share_prompt=False"):
        attention.check_model_shares_prompts(model)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (DogeConfig(**SIZES), "masks attention in a way of its own"),
        (Qwen2MoeConfig(**SIZES, num_experts=2, use_sliding_window=True, max_window_layers=2), "a sliding window that"),
    ],
)
def test_what_a_model_says_by_a_mask_alone_is_refused_where_it_computes(config, words):
    model = build(config)
    attention.check_model_shares_prompts(model)
    model.set_attn_implementation(attention.NAME)
    with pytest.raises(ValueError, match=f"{words}.*actor_rollout_ref.share_prompt=False"):
        shared_logps(model, as_rows(*draw_rows(0)))


def test_the_layers_of_a_model_of_texts_and_images_are_those_of_its_text_part():
    model = build(MODELS["grouped queries"])
    text = Lfm2Config(num_hidden_layers=2, layer_types=["full_attention", "conv"])
    model.config = Lfm2VlConfig(text_config=text.to_dict())
    with pytest.raises(ValueError, match="kinds conv, .*actor_rollout_ref.share_prompt=False"):
        attention.check_model_shares_prompts(model)


def test_a_model_that_gives_all_logits_is_refused(monkeypatch):
    """verl replaces the forward pass of some, and would have made log-probs of the wrong tokens."""
    model = torch.nn.Linear(2, 2)
    monkeypatch.setattr(FSDPEngineWithLMHead, "_build_module", lambda self: model)
    engine = SeparateEngine.__new__(SeparateEngine)
    engine.engine_config = FSDPEngineConfig(model_dtype="fp32")
    with pytest.raises(ValueError, match="Linear.forward takes no logits_to_keep.*actor_rollout_ref.model.path"):
        engine._build_module()


def test_a_model_with_a_state_is_refused():
    model = build(MODELS["grouped queries"])
    model._is_stateful = True
    with pytest.raises(ValueError, match="not attention alone.*share_prompt=False"):
        attention.check_model_shares_prompts(model)


@pytest.mark.parametrize("asked", [{"dropout": 0.1}, {"s_aux": torch.zeros(4)}, {"visibility": None}])
def test_attention_that_is_not_there_is_refused(asked):
    packed = pack([[1, 2]], [[[3]]])
    tensors = [torch.zeros(1, 4, 3, 8)] * 3
    with pytest.raises(ValueError, match="share_prompt=False"):
        attention.shared_prompt_attention(
            torch.nn.Identity(), *tensors, None, **({"visibility": packed.visibility} | asked)
        )


def test_full_precision_is_refused_where_kernels_are_half():
    with pytest.raises(ValueError, match="param_dtype=bf16"):
        attention._half(torch.zeros(2))
    with torch.autocast("cpu", torch.bfloat16):
        assert attention._half(torch.zeros(2))[0].dtype == torch.bfloat16


# ---- Log-probs -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 300])
def test_token_logps_and_their_gradient(temperature, kind, tokens):
    torch.manual_seed(tokens)
    hidden, labels = torch.randn(tokens, 5, dtype=kind), torch.randint(0, 50, (tokens,))
    weights = torch.randn(5, 50, dtype=kind)
    slopes = torch.randn(tokens)
    gradients, values = [], []
    for function in (lambda logits: token_logps(logits, labels, temperature), None):
        leaf = weights.clone().requires_grad_()
        logits = hidden @ leaf
        if function is None:
            logps = (logits.float() / temperature).log_softmax(-1)
            found = logps.gather(1, labels[:, None]).squeeze(1)
        else:
            found = function(logits)
        (found * slopes).sum().backward()
        values.append(found.detach())
        gradients.append(leaf.grad)
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-4 if kind == torch.float32 else 1e-2, atol=1e-4)


def test_backward_writes_the_gradient_over_the_logits():
    logits = torch.randn(3, 7, requires_grad=True)
    product = logits * 2  # a multiplication by a number keeps nothing of its result
    token_logps(product, torch.tensor([1, 2, 3])).sum().backward()
    expected = torch.autograd.grad((logits * 2).log_softmax(-1)[range(3), [1, 2, 3]].sum(), logits)[0]
    torch.testing.assert_close(logits.grad, expected)
    torch.testing.assert_close(product.detach(), expected / 2)


def test_entropies():
    logits = torch.randn(300, 7)
    expected = torch.distributions.Categorical(logits=logits / 0.7).entropy()
    torch.testing.assert_close(token_entropies(logits, 0.7), expected)


def test_what_a_drawn_token_has_on_average():
    logits = torch.randn(300, 7)
    probs = (logits / 0.7).softmax(-1)
    torch.testing.assert_close(token_log_expected_probs(logits, 0.7), (probs * probs).sum(-1).log())


def test_weights_of_responses_leave_out_what_does_not_count():
    values, mask = torch.tensor([0.5, 0.25, torch.nan, 0.5]).log(), torch.tensor([1, 1, 0, 1])
    weights = response_weights(values, torch.full((4,), 0.5).log(), mask, [2, 0, 2])
    torch.testing.assert_close(weights, torch.tensor([0.5**0.5, 1.0, 1.0]))


def test_values_of_responses_leave_out_what_does_not_count():
    values, mask = torch.tensor([1.0, 2.0, torch.nan, 4.0]), torch.tensor([1, 1, 0, 1])
    assert response_values(values, mask, [2, 0, 2], average=False).tolist() == [3.0, 0.0, 4.0]
    assert response_values(values, mask, [2, 0, 2], average=True).tolist() == [1.5, 0.0, 4.0]
    assert nest([torch.zeros(0), torch.zeros(2)]).offsets().tolist() == [0, 0, 2]
