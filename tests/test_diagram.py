"""The picture of a network shows its pairs, and what a partial step leaves out."""

import xml.etree.ElementTree as ET

import pytest

from minicache.checkpoints import shape_of
from minicache.tools.diagram import DEEP, EDGE, LIVE, diagram, main, parse

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("name", ["cifar10", "lsun_256"])
def test_every_block_is_there_and_only_the_branch_is_alive(name):
    unet = shape_of(name)
    for branch in (1, 3, len(unet.D)):
        drawn = ET.fromstring(diagram(unet, branch))
        names = [text.text for text in drawn.iter(SVG + "text")]
        boxes = [box.get("fill") for box in drawn.iter(SVG + "rect")]
        for i in range(len(unet.D)):
            assert names.count(f"D[{i}]") == names.count(f"U[{i}]") == 1
        assert boxes.count(LIVE) == 2 * branch and boxes.count(DEEP) == 2 * (len(unet.D) - branch) + 1
        assert sum(line.get("stroke") == EDGE for line in drawn.iter(SVG + "polyline")) == 1


def test_the_cached_edge_tells_its_shape():
    assert "cached_U 128 x 32 x 32" in diagram(shape_of("cifar10"), 1)
    assert "cached_U 256 x 32 x 32" in diagram(shape_of("cifar10"), 3)


def test_one_pair_is_no_plural():
    for branch, said in ((1, "runs the outermost pair;"), (2, "runs the 2 outermost pairs;")):
        assert said in diagram(shape_of("cifar10"), branch)


def test_a_branch_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"branch=13 is not in 1\.\.12"):
        diagram(shape_of("cifar10"), 13)


def test_only_an_svg_is_written(tmp_path):
    (tmp_path / "net.pt").write_text("weights")
    with pytest.raises(ValueError, match=r"the ending must be \.svg"):
        main(parse(["--ckpt", "cifar10", "--out", str(tmp_path / "net.pt")]))
    assert (tmp_path / "net.pt").read_text() == "weights"
