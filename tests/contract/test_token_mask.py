"""`genarm_kernels.token_mask`: the masks hold what bits set one by one hold."""

import pytest
import torch

from genarm_kernels import guided_step, token_mask

WIDTHS = [1, 31, 32, 33, 64, 100, 1000]


def by_bits(rows, vocab):
    """The mask `[B, W]` of the allowed ids, in Python's integers."""
    words = [[sum(1 << v % 32 for v in set(row) if v // 32 == w) for w in range(-(-vocab // 32))] for row in rows]
    return torch.tensor([[n - (n >> 31 << 32) for n in row] for row in words], dtype=torch.int32)


def some_rows(vocab):
    """Ids of rows: none, all, the first, the last, every third backwards."""
    return [[], range(vocab), [0], [vocab - 1], range(vocab - 1, -1, -3)]


def as_bools(rows, vocab):
    return torch.tensor([[v in row for v in range(vocab)] for row in rows])


def same(mask, expected):
    return mask.dtype == expected.dtype and torch.equal(mask, expected)


@pytest.mark.parametrize("vocab", WIDTHS)
def test_masks_of_bools_and_of_ids_hold_the_bits_set_one_by_one(vocab):
    rows = some_rows(vocab)
    expected = by_bits(rows, vocab)
    assert same(token_mask.from_bools(as_bools(rows, vocab)), expected)
    assert same(token_mask.from_bools(as_bools(rows, vocab).t().contiguous().t()), expected)
    assert same(token_mask.from_allowed_ids(rows, vocab), expected)
    assert same(token_mask.from_allowed_ids([[0, 0], [0]], vocab), by_bits([[0], [0]], vocab))


@pytest.mark.parametrize("vocab", WIDTHS)
def test_a_mask_is_read_back(vocab):
    bools = as_bools(some_rows(vocab), vocab)
    mask = token_mask.from_bools(bools)
    wider = torch.cat([mask, torch.full((len(mask), 2), -1, dtype=torch.int32)], 1)
    for one in (mask, wider, mask.t().contiguous().t()):
        assert same(token_mask.to_bools(one, vocab), bools)
    random = torch.randint(-(2**31), 2**31, (3, len(mask[0])), generator=torch.Generator().manual_seed(vocab)).int()
    assert same(token_mask.from_bools(token_mask.to_bools(random, random.shape[1] * 32)), random)


@pytest.mark.parametrize("vocab", WIDTHS)
def test_an_allocated_mask_allows_all_or_none(vocab):
    for allowed in (True, False):
        mask = token_mask.allocate(3, vocab, allowed=allowed)
        assert mask.dtype == torch.int32 and mask.shape == (3, -(-vocab // 32)) and mask.is_contiguous()
        assert same(token_mask.to_bools(mask, vocab), torch.full((3, vocab), allowed))
    assert same(token_mask.allocate(3, vocab), token_mask.allocate(3, vocab, allowed=True))


def test_masks_of_no_rows():
    assert token_mask.allocate(0, 40).shape == token_mask.from_allowed_ids([], 40).shape == (0, 2)
    assert token_mask.from_bools(torch.zeros(0, 40, dtype=torch.bool)).shape == (0, 2)
    assert token_mask.to_bools(torch.zeros(0, 2, dtype=torch.int32), 40).shape == (0, 40)


def test_a_mask_lies_where_it_is_asked_for():
    meta = torch.device("meta")
    assert token_mask.from_bools(torch.zeros(2, 40, dtype=torch.bool, device=meta)).device == meta
    assert token_mask.to_bools(torch.zeros(2, 2, dtype=torch.int32, device=meta), 40).device == meta
    assert token_mask.allocate(2, 40, device="meta").device == meta
    assert token_mask.from_allowed_ids([[1]], 40, device=meta).device == meta
    with meta:
        assert token_mask.allocate(2, 40).device == token_mask.from_allowed_ids([[1]], 40).device == meta
        assert token_mask.allocate(2, 40, device="cpu").device == torch.device("cpu")
        on_the_cpu = token_mask.from_allowed_ids([[1]], 40, device="cpu")
    assert same(on_the_cpu, by_bits([[1]], 40))


def test_guided_step_draws_what_a_mask_allows(backend):
    logits = torch.zeros(3, 100)
    mask = token_mask.from_allowed_ids([[7], [31, 32, 99], []], 100, device=logits.device)
    step = guided_step(logits, token_mask=mask, backend=backend)
    assert step.kept.tolist() == [1, 3, 0] and step.status.tolist() == [0, 0, 2]
    assert step.token[0] == 7 and step.token[1] in (31, 32, 99)
    everything = token_mask.allocate(3, 100, device=logits.device)
    assert guided_step(logits, token_mask=everything, backend=backend).kept.tolist() == [100] * 3


BOOLS, WORDS = torch.ones(2, 40, dtype=torch.bool), torch.ones(2, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: token_mask.allocate(-1, 40), ValueError, r"batch_size: expected an integer of at least 0, got -1"),
        (lambda: token_mask.allocate(2, 0), ValueError, r"vocab_size: expected an integer of at least 1, got 0"),
        (lambda: token_mask.allocate(2.0, 40), TypeError, r"batch_size: expected an int.*, got float 2.0"),
        (lambda: token_mask.allocate(2, True), TypeError, r"vocab_size: expected an int.*, got bool"),
        (lambda: token_mask.allocate(2, 40, allowed=1), TypeError, r"allowed: expected a bool, got int 1"),
        (lambda: token_mask.from_bools([[True]]), TypeError, r"allowed: expected a tensor, got list"),
        (lambda: token_mask.from_bools(BOOLS[0]), ValueError, r"allowed: .*bool \[B, V\], got torch.bool \[40\]"),
        (lambda: token_mask.from_bools(BOOLS.int()), ValueError, r"allowed: .*, got torch.int32 \[2, 40\]"),
        (lambda: token_mask.from_bools(BOOLS[:, :0]), ValueError, r"allowed: .*, got torch.bool \[2, 0\]"),
        (lambda: token_mask.from_allowed_ids([[1], [40]], 40), ValueError, r"allowed_ids\[1\]\[0\]: .*0 to 39, got 40"),
        (lambda: token_mask.from_allowed_ids([[1, -1]], 40), ValueError, r"allowed_ids\[0\]\[1\]: .*0 to 39, got -1"),
        (lambda: token_mask.from_allowed_ids([1, 2], 40), TypeError, r"allowed_ids\[0\]: .*a list of ids, got int"),
        (lambda: token_mask.from_allowed_ids([{1}], 40), TypeError, r"allowed_ids\[0\]: .*a list of ids, got set"),
        (lambda: token_mask.from_allowed_ids(5, 40), TypeError, r"allowed_ids: .*ids for each row, got int"),
        (lambda: token_mask.from_allowed_ids(["1"], 40), TypeError, r"allowed_ids\[0\]: .*a list of ids, got str"),
        (lambda: token_mask.from_allowed_ids([[1.0]], 40), TypeError, r"allowed_ids\[0\]\[0\]: .*an int.*, got float"),
        (lambda: token_mask.from_allowed_ids([[0]], 0), ValueError, r"vocab_size: .*at least 1, got 0"),
        (lambda: token_mask.to_bools(WORDS, 65), ValueError, r"token_mask: .*\[B, >= 3\], got torch.int32 \[2, 2\]"),
        (lambda: token_mask.to_bools(WORDS.long(), 40), ValueError, r"token_mask: .*int32.*, got torch.int64 \[2, 2\]"),
        (lambda: token_mask.to_bools(WORDS[0], 40), ValueError, r"token_mask: .*, got torch.int32 \[2\]"),
        (lambda: token_mask.to_bools([[1]], 1), TypeError, r"token_mask: expected a tensor, got list"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_mask_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
