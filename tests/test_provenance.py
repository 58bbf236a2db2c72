"""What a result depends on, told the same in every process."""

from featherweight.provenance import identity


def test_a_function_is_the_same_in_every_process_and_another_one_is_not():
    """Where code lies in memory differs from process to process, and must not count; what it does must."""
    text = "def f(x):\n return [(lambda y: y + 1)(v) for v in x if v in {'a', 'b'}]"
    alive = []

    def told(source: str) -> object:
        made: dict = {}
        exec(source, made)
        alive.append(made)  # so that the next code lies elsewhere
        return identity(made["f"])

    assert told(text) == told(text)
    for other in (("y + 1", "y + 2"), ("'a'", "'c'"), ("if v in", "if v not in"), ("def f", "def g")):
        changed = text.replace(*other)
        assert told(changed + "\nf = g" if "def g" in changed else changed) != told(text), other
    assert told(text.replace("{'a', 'b'}", "{'b', 'a'}")) == told(text)
