"""Plain numbers that depend on the step or on a length."""

from __future__ import annotations


def lambda_decay(
    step: int, *, start: float = 1.0, hold: int = 50, every: int = 10, drop: float = 0.1, floor: float = 0.5
) -> float:
    """λ(t) = max( start − drop·ceil( max(t − hold, 0) / every ), floor ).

    The weight of the base in KL-Convex, ReMix (arXiv 2507.06892): 1 up to step 50, 0.9 on 51..60, ..., 0.5 from 91.
    Rounded to 12 decimals: every λ is the float that its decimal says (1 − 0.05·7 = 0.65, not 0.6499999999999999).
    """
    drops = -(-max(step - hold, 0) // every)  # ceil in integers: no float decides on which step a drop falls
    return max(round(start - drop * drops, 12), floor)


def overlong_penalty(length: int, max_tokens: int, buffer: int) -> float:
    """Soft penalty in [−1, 0] on a response of `length` tokens, added to its reward.

        0                                        length ≤ max_tokens − buffer
        (max_tokens − buffer − length)/buffer    in between: falls linearly to −1 at max_tokens
        −1                                       length > max_tokens

    DAPO (arXiv 2503.14476, eq. 13). buffer = 0 leaves the hard step at max_tokens.
    """
    if not 0 <= buffer <= max_tokens:
        raise ValueError(f"the buffer ({buffer}) lies within the response: between 0 and max_tokens ({max_tokens})")
    excess = length - (max_tokens - buffer)
    if excess <= 0:
        return 0.0
    return -1.0 if excess > buffer else -excess / buffer
