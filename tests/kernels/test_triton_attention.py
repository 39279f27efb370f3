"""Triton attention, norms and rotary embedding against their twins: interpreted, and on a GPU if there is one."""

import pytest
import torch
from kv_cases import quantize_cache
from triton_cases import Case, assert_near, kernel_tests, run_cases

from moe_runtime.kernels import kv_rows, reference, torch_attention, torch_ops
from moe_runtime.kernels.attention import AttentionMetadata
from moe_runtime.kernels.kv_rows import DTYPES, KVScales

BLOCK_SIZE = 4
# Name -> query rows and keys of each sequence.
STEPS = {
    "first token": ([1], [1]),
    "decodes": ([1, 1, 1], [1, 13, 300]),
    "a chunk's edge": ([1, 1], [256, 257]),
    "whole prompt": ([11], [11]),
    "chunk of a prompt": ([5], [14]),
    "mixed": ([1, 1, 3, 7, 2], [9, 2, 3, 262, 10]),
}


def random_step(
    step: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    heads: int = 6,
    groups: int = 2,
    head_size: int = 8,
    value_size: int = 8,
    in_keys: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, AttentionMetadata]:
    """Queries, caches and metadata of sequences whose pages lie scattered; pages of nobody are poison. With `in_keys`,
    values are a view of the keys."""
    num_query, context_len = STEPS[step]
    num_pages = [-(-context // BLOCK_SIZE) for context in context_len]
    pages = torch.randperm(sum(num_pages) + 3).tolist()
    blocks = [[pages.pop() for _ in range(count)] for count in num_pages]
    shape = (sum(num_pages) + 3, BLOCK_SIZE, groups)
    k_cache = torch.randn(*shape, head_size, device=device).to(dtype)
    v_cache = k_cache[..., :value_size] if in_keys else torch.randn(*shape, value_size, device=device).to(dtype)
    k_cache[pages] = v_cache[pages] = float("nan")
    meta = AttentionMetadata.build(num_query, context_len, blocks, device)
    wide = torch.randn(sum(num_query), heads + 2, head_size, device=device).to(dtype)  # as a part of a projection
    return wide[:, :heads], k_cache, v_cache, meta


def attention_case(step: str) -> Case:
    def check(device: torch.device, dtype: torch.dtype) -> None:
        from moe_runtime.kernels.triton import attention

        for window in (None, 3, 257):
            operands = random_step(step, device, dtype)
            options = {"scale": 0.3, "sliding_window": window}
            expected = reference.paged_attention(*operands, **options)
            assert_near(attention.paged_attention(*operands, **options), expected)
            assert_near(attention.invariant_paged_attention(*operands, **options), expected)

    return check


def heads_case(heads: int, groups: int, head_size: int, value_size: int, in_keys: bool = False) -> Case:
    def check(device: torch.device, dtype: torch.dtype) -> None:
        from moe_runtime.kernels.triton import attention

        for step in ("decodes", "whole prompt"):  # 21 heads make more than one block of pairs
            operands = random_step(
                step,
                device,
                dtype,
                heads=heads,
                groups=groups,
                head_size=head_size,
                value_size=value_size,
                in_keys=in_keys,
            )
            expected = reference.paged_attention(*operands, scale=0.2, sliding_window=None)
            assert_near(attention.paged_attention(*operands, scale=0.2, sliding_window=None), expected)

    return check


def sinks_case(window: int | None) -> Case:
    def check(device: torch.device, dtype: torch.dtype) -> None:
        from moe_runtime.kernels.triton import attention

        operands = random_step("mixed", device, dtype, head_size=24, value_size=16)
        sinks = torch.tensor([500.0, -500, *torch.randn(4) * 2], device=device)
        options = {"scale": 0.3, "sliding_window": window, "sinks_H": sinks}
        expected = reference.paged_attention(*operands, **options)
        assert_near(attention.paged_attention(*operands, **options), expected)
        assert_near(attention.invariant_paged_attention(*operands, **options), expected)

    return check


def quantized_case(name: str, head_size: int, value_size: int, in_keys: bool = False) -> Case:
    def check(device: torch.device, dtype: torch.dtype) -> None:
        from moe_runtime.kernels.triton import attention

        sizes = {"head_size": head_size, "value_size": value_size, "in_keys": in_keys, "groups": 1 if in_keys else 2}
        for step, window in (("decodes", None), ("mixed", 7)):
            q, k_cache, v_cache, meta = random_step(step, device, dtype, **sizes)
            *codes, scales = quantize_cache(k_cache, v_cache, name)
            options = {"scale": 0.3, "sliding_window": window, "kv_scales": scales}
            expected = reference.paged_attention(q, *codes, meta, **options)
            assert_near(attention.paged_attention(q, *codes, meta, **options), expected)
            assert_near(attention.invariant_paged_attention(q, *codes, meta, **options), expected)

    return check


def rows_of_8_bits_have_the_bits_of_their_twin(device: torch.device, dtype: torch.dtype) -> None:
    from moe_runtime.kernels.triton import quantized_rows, rotary

    for name, parts in (("int8", (12,)), ("fp8", (12,)), ("int8", (5, 7)), ("fp8", (8, 4))):
        wide = torch.randn(9, 5, 12) * torch.logspace(-4, 4, 9)[:, None, None]
        wide[1], wide[2, 0, 3], wide[3, :, 1::3] = 0, float("nan"), 3e3
        x = wide.to(dtype)[:, 1:4]
        position = torch.randperm(16)[:9]
        caches = [torch.zeros(4, 4, 3, 12).to(DTYPES[name]) for _ in range(2)]
        scales = [torch.zeros(4, 4, 3, len(parts)) for _ in range(2)]
        kv_rows.store_quantized(x, caches[0], scales[0], position, parts)
        found, found_scales = caches[1].to(device), scales[1].to(device)
        quantized_rows.store_quantized(x.to(device), found, found_scales, position.to(device), parts)
        finite = scales[0].isfinite().all(3)
        assert torch.equal(found_scales.cpu()[finite], scales[0][finite])
        assert torch.equal(found_scales.cpu().isfinite(), scales[0].isfinite())
        assert torch.equal(found.cpu().view(torch.uint8)[finite], caches[0].view(torch.uint8)[finite])
    k, v = (torch.randn(3, 2, 8, device=device).to(dtype) for _ in range(2))
    cos, sin = torch.randn(2, 3, 8, device=device)
    caches, scales = torch.zeros(2, 2, 4, 2, 8, device=device).to(torch.int8), torch.zeros(2, 2, 4, 2, 1, device=device)
    turned = rotary.rotary_store_kv(k, k, v, cos, sin, *caches, torch.arange(3, device=device), KVScales(*scales))
    assert torch.equal(turned, torch_ops.apply_rotary(k, k, cos, sin)[0])
    for cache, scale, rows in zip(caches, scales, (turned, v), strict=True):
        read = kv_rows.widen_rows(cache[0, :3], scale[0, :3], (8,), torch.float32)
        assert (read - rows.float()).abs().max() <= float(scale.max()) * 0.51
    with pytest.raises(ValueError, match=r"^cache_NBGd: .* does not fit x_TGd"):
        quantized_rows.store_quantized(v, caches[0], scales[0], torch.arange(3, device=device), (7,))
    with pytest.raises(ValueError, match=r"^scale_NBGP: .* must be float32"):
        quantized_rows.store_quantized(v, caches[0], scales[0].half(), torch.arange(3, device=device), (8,))


def decode_bits_do_not_depend_on_the_batch(device: torch.device, dtype: torch.dtype) -> None:
    from moe_runtime.kernels.triton import attention

    sinks = torch.randn(6, device=device)
    for window, sinks_H in ((None, None), (5, sinks), (None, sinks)):
        sizes = {"groups": 1, "head_size": 40, "value_size": 32, "in_keys": True} if window is None else {}
        q, k_cache, v_cache, meta = random_step("mixed", device, dtype, **sizes)
        options = {"scale": 0.3, "sliding_window": window, "sinks_H": sinks_H}
        together = attention.invariant_paged_attention(q, k_cache, v_cache, meta, **options)
        places = meta.on_device
        for row in torch.randperm(meta.num_tokens)[:2].tolist():
            position = int(places.position_T[row])
            table = meta.page_table[int(places.sequence_T[row])][None]
            alone = AttentionMetadata(1, [0, 1], [position + 1], table)
            one = attention.paged_attention(q[row : row + 1], k_cache, v_cache, alone, **options)
            assert torch.equal(one[0], together[row]), (row, window)


def longer_grids_give_the_same_bits(device: torch.device, dtype: torch.dtype) -> None:
    from moe_runtime.kernels.triton import attention

    q, k_cache, v_cache, meta = random_step("decodes", device, dtype)
    places = (meta.page_table, meta.on_device.sequence_T, meta.on_device.position_T)
    for window, sinks_H in ((None, torch.randn(6, device=device)), (7, None)):
        options = {"scale": 0.3, "sliding_window": window, "sinks_H": sinks_H}
        out = [
            attention.decode_attention(q, k_cache, v_cache, *places, max_context=most, **options)
            for most in (300, 1500)
        ]
        assert torch.equal(*out)


def rows_that_take_turns_give_the_same_bits(device: torch.device, dtype: torch.dtype) -> None:
    from moe_runtime.kernels.triton import decode_attention

    q, k_cache, v_cache, meta = random_step("whole prompt", device, dtype)
    places = (meta.page_table, meta.on_device.sequence_T, meta.on_device.position_T)
    options = {"max_context": 262, "scale": 0.3, "sliding_window": None, "sinks_H": torch.randn(6, device=device)}
    together = decode_attention.decode_attention(q, k_cache, v_cache, *places, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_attention, "MOST_SUMS", 1)
        assert torch.equal(decode_attention.decode_attention(q, k_cache, v_cache, *places, **options), together)


def decode_gives_what_its_twin_gives(device: torch.device, dtype: torch.dtype) -> None:
    from moe_runtime.kernels.triton import attention

    q, k_cache, v_cache, meta = random_step("mixed", device, dtype)
    caches = (k_cache.nan_to_num(), v_cache.nan_to_num())  # the twin reads padding, with a weight of 0
    places = (meta.page_table, meta.on_device.sequence_T, meta.on_device.position_T)
    for window, sinks_H in ((None, None), (7, torch.randn(6, device=device))):
        options = {"max_context": 270, "scale": 0.3, "sliding_window": window, "sinks_H": sinks_H}
        table = torch.nn.functional.pad(meta.page_table, (0, 70 - meta.page_table.shape[1]))
        actual = attention.decode_attention(q, *caches, *places, **options)
        assert_near(actual, torch_attention.decode_attention(q, *caches, table, *places[1:], **options))


def norms_give_what_their_twins_give(device: torch.device, dtype: torch.dtype) -> None:
    from moe_runtime.kernels.triton import norms

    for shape in ((0, 8), (1, 1), (9, 33), (3, 300), (5, 6, 16), (2, 5000)):
        x, residual = torch.randn(2, *shape, device=device).to(dtype)
        weight = torch.randn(shape[-1], device=device).to(dtype)
        assert_near(norms.rms_norm(x, weight, 1e-6), torch_ops.rms_norm(x, weight, 1e-6))
        for multiplier in (1.0, 0.22):
            normed, total = norms.add_rms_norm(x, residual, weight, 1e-6, multiplier)
            expected_normed, expected_total = torch_ops.add_rms_norm(x, residual, weight, 1e-6, multiplier)
            assert_near(total, expected_total)
            assert multiplier != 1.0 or torch.equal(total, expected_total)
            assert_near(normed, expected_normed)
        if len(shape) == 2:
            gate = weight / shape[-1] ** 0.5  # so that no factor is as good as 0
            assert_near(norms.scale_rows(x, residual, gate), torch_ops.scale_rows(x, residual, gate))
    q = torch.randn(5, 12, 16, device=device).to(dtype)[:, 2:8]
    weight = torch.randn(16, device=device).to(dtype)
    assert_near(norms.rms_norm(q, weight, 1e-5), torch_ops.rms_norm(q, weight, 1e-5))


def silu_mul_gives_what_its_twin_gives(device: torch.device, dtype: torch.dtype) -> None:
    from moe_runtime.kernels.triton import norms

    for shape in ((0, 8), (1, 2), (7, 66), (2, 3, 2100)):
        x = torch.randn(shape, device=device).to(dtype)
        assert_near(norms.silu_mul(x), torch_ops.silu_mul(x))


def rotary_gives_the_bits_of_its_twin(device: torch.device, dtype: torch.dtype) -> None:
    from moe_runtime.kernels.triton import rotary

    for num_tokens, heads, groups, size, turned in (
        (0, 2, 1, 4, 4),
        (5, 6, 3, 16, 16),
        (7, 5, 1, 20, 6),
        (3, 8, 2, 64, 32),
    ):
        parts = torch.randn(num_tokens, heads + 2 * groups, size, device=device).to(dtype)
        q, k, v = parts.split((heads, groups, groups), 1)
        cos, sin = torch.randn(2, num_tokens, turned, device=device)
        if num_tokens % 2:
            cos, sin = cos.to(dtype), sin.to(dtype)
        assert all(map(torch.equal, rotary.apply_rotary(q, k, cos, sin), torch_ops.apply_rotary(q, k, cos, sin)))
        slot = torch.randperm(4 * BLOCK_SIZE, device=device)[:num_tokens]
        before = torch.randn(2, 4, BLOCK_SIZE, groups, size, device=device).to(dtype)
        actual, expected = before.clone(), before.clone()
        turned_q = rotary.rotary_store_kv(q, k, v, cos, sin, *actual, slot)
        expected_q = torch_attention.rotary_store_kv(q, k, v, cos, sin, *expected, slot)
        assert torch.equal(turned_q, expected_q) and torch.equal(actual, expected)
        actual, expected = before.clone(), before.clone()
        rotary.store_kv(k, v, *actual, slot)
        torch_attention.store_kv(k, v, *expected, slot)
        assert torch.equal(actual, expected)


def unfit_operands_are_refused(device: torch.device, dtype: torch.dtype) -> None:
    from moe_runtime.kernels.triton import attention, norms, rotary

    q, k_cache, v_cache, meta = random_step("decodes", device, dtype)
    options = {"scale": 0.3, "sliding_window": None}
    with pytest.raises(ValueError, match="q_THd: shape"):
        attention.paged_attention(q[:, :5], k_cache, v_cache, meta, **options)
    with pytest.raises(ValueError, match=r"k_cache_NBGd: .* must be contiguous"):
        attention.paged_attention(q[..., :4], k_cache[..., :4], v_cache, meta, **options)
    for wrong in (v_cache[..., :4], k_cache[..., 4:], k_cache.mT.contiguous().mT):
        with pytest.raises(ValueError, match=r"v_cache_NBGe: strides .* must be contiguous, or the first numbers"):
            attention.paged_attention(q, k_cache, wrong, meta, **options)
    with pytest.raises(ValueError, match="v_cache_NBGe: shape"):
        attention.paged_attention(q, k_cache, v_cache[:, :, :1], meta, **options)
    for wrong in (torch.randn(5, device=device), torch.randn(6, device=device).half()):
        with pytest.raises(ValueError, match=r"sinks_H: .* must be float32 of 6 query heads"):
            attention.paged_attention(q, k_cache, v_cache, meta, **options, sinks_H=wrong)
    with pytest.raises(ValueError, match="sinks_H: strides"):
        attention.paged_attention(q, k_cache, v_cache, meta, **options, sinks_H=torch.randn(12, device=device)[::2])
    with pytest.raises(ValueError, match=r"weight_D: .* must be"):
        norms.rms_norm(q, torch.ones(9, device=device, dtype=dtype), 1e-6)
    with pytest.raises(ValueError, match="cache positions must be int64"):
        k = q[:, :2]
        rotary.store_kv(k, k, k_cache, v_cache, torch.arange(len(k), device=device, dtype=torch.int32))


CASES: dict[str, Case] = {
    **{f"attention, {step}": attention_case(step) for step in STEPS},
    **{
        f"attention, {h} heads of {d}/{e} in {g} groups": heads_case(h, g, d, e)
        for h, g, d, e in ((1, 1, 20, 20), (4, 4, 64, 64), (21, 1, 7, 7), (6, 2, 24, 16), (2, 1, 40, 20))
    },
    # Values that are a key's first block, also with heads in two blocks, and values that are a part of it.
    **{
        f"attention, {h} heads of {d}/{e}, values in {g} groups of keys": heads_case(h, g, d, e, in_keys=True)
        for h, g, d, e in ((4, 2, 40, 32), (34, 1, 72, 64), (5, 1, 24, 16))
    },
    "attention, rows of int8": quantized_case("int8", 20, 20),
    "attention, rows of fp8, values in keys": quantized_case("fp8", 40, 32, in_keys=True),
    "attention, rows of int8, values in keys": quantized_case("int8", 24, 16, in_keys=True),
    **{f"attention with sinks, window {window}": sinks_case(window) for window in (None, 3)},
    **{
        check.__name__: check
        for check in (
            decode_bits_do_not_depend_on_the_batch,
            longer_grids_give_the_same_bits,
            rows_that_take_turns_give_the_same_bits,
            decode_gives_what_its_twin_gives,
            norms_give_what_their_twins_give,
            silu_mul_gives_what_its_twin_gives,
            rotary_gives_the_bits_of_its_twin,
            rows_of_8_bits_have_the_bits_of_their_twin,
            unfit_operands_are_refused,
        )
    },
}


interpreted, test_interpreted, test_on_gpu = kernel_tests(__file__, CASES)


if __name__ == "__main__":
    run_cases(CASES)
