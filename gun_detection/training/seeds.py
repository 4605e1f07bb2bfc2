"""Seeds that follow from where a training is, so that no random state has to be kept."""


def mix(*numbers: int) -> int:
    """One seed of several numbers, other for each combination that a training meets."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number) % 2**63
    return seed
