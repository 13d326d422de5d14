from benchmarks.accuracy import overrides


def test_a_variant_is_a_family_with_options_and_a_number_of_blocks() -> None:
    assert overrides("glcan") == ["--local.auxiliary", "glcan"]
    assert overrides("glcan@8") == ["--local.auxiliary", "glcan", "--local.cut", "[]", "--local.blocks", "8"]
    options = ["--local.auxiliary.depth", "1", "--local.auxiliary.width", "0.5"]
    assert overrides("glcan:depth=1,width=0.5") == ["--local.auxiliary", "glcan", *options]
