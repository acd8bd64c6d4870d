"""Covering arrays: few cases in which any values of two parameters, or of three, still meet."""

from itertools import combinations, product


def covering_array(*parameters, strength=2):
    """Cases for ``pytest.mark.parametrize`` in the place of all of ``itertools.product(*parameters)``.

    Faults hardly ever need more than two or three values to show; which ones do is not known, so each combination of
    the values of ``strength`` parameters is in a case.
    """
    cases = list(product(*(range(len(values)) for values in parameters)))
    met = {case: set(combinations(enumerate(case), strength)) for case in cases}
    missing, chosen = set().union(*met.values()), []
    while missing:
        case = max(cases, key=lambda case: len(met[case] & missing))
        missing -= met[case]
        chosen.append(tuple(values[i] for values, i in zip(parameters, case)))
    return chosen
