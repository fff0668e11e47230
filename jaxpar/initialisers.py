"""Which initialisers XLA can't split: leaves that every device makes whole before it keeps its share."""

from typing import Any

# Each is one call of a linear algebra library, whatever the sharding of what comes out.
_WHOLE_PRIMITIVES = frozenset(
    ["cholesky", "eig", "eigh", "geqrf", "householder_product", "lu", "qr", "schur", "svd", "triangular_solve"]
)


def find_makers(jaxpr: Any) -> list[str | None]:
    """Returns, for each output of a jaxpr, the primitive that makes it whole on every device, or None.

    Args:
      jaxpr: what `jax.make_jaxpr` gives, of a function that makes a state.

    >>> import jax
    >>> orthogonal = jax.nn.initializers.orthogonal()
    >>> find_makers(jax.make_jaxpr(lambda key: (orthogonal(key, (4, 4)), key))(jax.random.key(0)))
    ['qr', None]
    """
    return _find(jaxpr.jaxpr, [None] * len(jaxpr.jaxpr.invars))


def _find(jaxpr: Any, inputs: list[str | None]) -> list[str | None]:
    makers = dict(zip(jaxpr.invars, inputs, strict=True))
    # A literal among the inputs has a value, and no maker.
    of = lambda atom: None if hasattr(atom, "val") else makers.get(atom)
    for eqn in jaxpr.eqns:
        found = next((maker for maker in map(of, eqn.invars) if maker), None)
        found = found or (eqn.primitive.name if eqn.primitive.name in _WHOLE_PRIMITIVES else None)
        inner = [value.jaxpr if hasattr(value, "jaxpr") else value for value in eqn.params.values()]
        inner = [value for value in inner if hasattr(value, "eqns")]
        if len(inner) == 1 and len(inner[0].invars) == len(eqn.invars) and len(inner[0].outvars) == len(eqn.outvars):
            makers |= zip(eqn.outvars, _find(inner[0], [of(atom) for atom in eqn.invars]), strict=True)
            continue
        for body in inner:
            found = found or next((maker for maker in _find(body, [None] * len(body.invars)) if maker), None)
        makers |= dict.fromkeys(eqn.outvars, found)
    return [of(atom) for atom in jaxpr.outvars]
