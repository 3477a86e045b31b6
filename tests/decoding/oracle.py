"""Guided decoding written a second time, as plainly as possible: numpy, Python integers, one row, no cache.

Shares no code with the package; what both must agree on is the contract's text (tile width, counter layout, filters).
"""

import math

import numpy as np

TILE = 1024


def philox(key, counter):
    """Philox4x32-10 on Python integers: key (2 words), counter (4 words) -> 4 words."""
    mask = 0xFFFFFFFF
    for _ in range(10):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [(b >> 32) ^ counter[1] ^ key[0], b & mask, (a >> 32) ^ counter[3] ^ key[1], a & mask]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    return counter


def random_bits(seed, position, tile, purpose):
    """64 bits as a Python integer."""
    seed, position = seed % 2**64, position % 2**64
    words = philox([seed & 0xFFFFFFFF, seed >> 32], [position & 0xFFFFFFFF, position >> 32, tile, purpose])
    return words[0] << 32 | words[1]


def distribution(logits, temperature):
    """softmax(logits / temperature) in float64; -inf is not allowed."""
    p = np.exp((np.float64(logits) - np.max(logits)) / temperature)
    return p / p.sum()


def kept(z, p, top_k=0, top_p=1.0, min_p=0.0):
    """The contract's rule 4, token by token."""
    allowed = z > -np.inf
    above = [z > z[v] for v in range(len(z))]
    in_k = np.array([allowed[v] and (top_k <= 0 or above[v].sum() < top_k) for v in range(len(z))])
    mass_k = p[in_k].sum()
    largest = z == z.max()
    in_p = np.array([top_p >= 1 or largest[v] or p[above[v]].sum() < top_p * mass_k for v in range(len(z))])
    return in_k & in_p & (largest | (p >= min_p * p.max()))


def draw(z, temperature, seed, position, **filters):
    """The token of one row from its float32 sum of logits z `[V]`."""
    if temperature == 0:
        return int(np.argmax(z))
    p = distribution(z, temperature)
    p = np.where(kept(z, p, **filters), p, 0.0)
    best, winner = -math.inf, -1
    for tile in range(math.ceil(len(z) / TILE)):
        mass = p[tile * TILE : (tile + 1) * TILE].sum()
        u = (2**64 - 1 - random_bits(seed, position, tile, 0) + 0.5) / 2**64
        u = min(u, 1 - 2**-53)  # coarse near 1, where the package is exact: no test reaches it
        score = (math.log(mass) if mass > 0 else -math.inf) - math.log(-math.log(u))
        if score > best:
            best, winner = score, tile
    target = random_bits(seed, position, 0, 1) / 2**64 * p[winner * TILE : (winner + 1) * TILE].sum()
    total = 0.0
    for v in range(winner * TILE, min((winner + 1) * TILE, len(z))):
        total += p[v]
        if total > target:
            return v
    raise AssertionError("the cumulative sum never passed its target")


def decode(forwards, prompt_ids, weights, steps, *, vocab_size, eos=(), temperature=1.0, seed=0, **filters):
    """Token ids of one prompt. `forwards`: functions from a list of ids to float32 logits `[V]`, the base's first;
    `prompt_ids`: what each of them sees before the continuation."""
    tokens = []
    for position in range(steps):
        z = np.zeros(vocab_size, np.float32)
        for forward, prompt, weight in zip(forwards, prompt_ids, [1.0, *weights], strict=True):
            if weight != 0:
                x = np.float64(forward(prompt + tokens)[:vocab_size])
                z = np.float32(z + np.float64(np.float32(weight)) * x)
        tokens.append(draw(z, float(np.float32(temperature)), seed, position, **filters))
        if tokens[-1] in eos:
            break
    return tokens
