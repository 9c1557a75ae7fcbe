"""The classifier behind the offline Frechet distance."""

import numpy as np
import pytest
import torch
from conftest import noise
from PIL import Image

from minicache.images import to_uint8
from minicache.metrics import frechet_distance
from minicache.tools import classifier
from minicache.tools.classifier import augmented, classifier_features


def test_it_learns(tmp_path, capsys):
    """Two classes that a mean tells apart, from folders on disk, by the command."""
    random = np.random.RandomState(0)
    for k, mean in enumerate((60, 190)):
        (tmp_path / "data" / f"{k}").mkdir(parents=True)
        for j in range(20):
            pixels = (mean + random.randint(-60, 60, (32, 32, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / f"{k}" / f"{j}.png")
    data, out = str(tmp_path / "data"), tmp_path / "c.pt"
    with torch.enable_grad():
        classifier.main(classifier.parse(["--data", data, "--test", data, "--epochs", "4", "--batch-size", "10",
                                          "--lr", "0.05", "--device", "cpu", "--out", str(out)]))  # fmt: skip
    content = torch.load(out, weights_only=True)
    assert content["accuracy"] > 0.9 and "are classified right" in capsys.readouterr().out
    assert set(content["state_dict"]) <= set(classifier.Classifier().state_dict())
    with pytest.raises(ValueError, match="--epochs 0 must be at least 1"):
        classifier.main(classifier.parse(["--epochs", "0"]))


def folders(root, **classes: int):
    """A folder of so many dark 32 x 32 pictures a class."""
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for k in range(count):
            Image.fromarray(np.full((32, 32, 3), 9 * k, np.uint8)).save(root / name / f"{k}.png")
    return str(root)


def test_what_cannot_be_trained_is_refused_and_nothing_written(tmp_path):
    out = tmp_path / "c.pt"
    cats = folders(tmp_path / "cats", cat=2, dog=2)
    ants = folders(tmp_path / "ants", ant=1, cat=1)
    (tmp_path / "older.pt").write_text("mine")
    one = folders(tmp_path / "one", cat=4)
    eleven = folders(tmp_path / "eleven", **{f"c{k}": 1 for k in range(11)})
    for data, test, more, words in (
        (cats, cats, ["--lr", "nan"], "--lr nan"),
        (cats, cats, ["--lr", "-1"], "--lr -1"),
        (cats, cats, ["--batch-size", "5"], "--batch-size 5 .* 4 images"),
        (eleven, eleven, [], "11 classes.* 10"),
        (one, one, [], "has 1 classes.* 2 to 10"),
        (cats, ants, [], "cat, dog.* ant, cat"),
        (cats, cats, ["--lr", "1e30"], "smaller --lr"),
        (cats, cats, ["--epochs", "1000000000000000000000"], "--epochs 1000000000000000000000 must be"),
        (cats, cats, ["--out", cats], "is a folder; give a file"),
        (cats, cats, ["--out", str(tmp_path / "older.pt")], "older.pt exists, and is perhaps the work of hours"),
        (cats, cats, ["--out", "data.zip"], "the ending must be .pt"),
        (cats, cats, ["--out", f"{cats}/cat/0.png/c.pt"], "cannot be made or written to"),
    ):
        flags = ["--data", data, "--test", test, "--epochs", "3", "--batch-size", "2", "--device", "cpu"]
        with pytest.raises(ValueError, match=words), torch.enable_grad():
            classifier.main(classifier.parse([*flags, "--out", str(out), *more]))
        assert not out.exists()


def test_augmentation_shifts_and_flips():
    images = torch.arange(32, dtype=torch.uint8)[:, None].expand(64, 32, 32, 3)
    x = augmented(images, torch.Generator().manual_seed(0))
    middle = ((x + 1) * 127.5).round()[:, 0, 16, 4:28]
    slopes = middle.diff(dim=1)
    rising, falling = (slopes == 1).all(1), (slopes == -1).all(1)
    assert (rising | falling).all() and 15 < rising.sum() < 50 and len(middle[rising][:, 0].unique()) > 4


def test_the_shipped_features_tell_pictures_from_noise():
    pictures = torch.stack([noise(3, 4, 4, seed=k) for k in range(40)]).repeat_interleave(8, 2).repeat_interleave(8, 3)
    features = [classifier_features(to_uint8(x)) for x in (pictures[:20], pictures[20:], noise(20, 3, 32, 32))]
    assert features[0].shape == (20, 128)
    assert 2 * frechet_distance(features[0], features[1]) < frechet_distance(features[0], features[2])
    with pytest.raises(ValueError, match=r"not \[2, 16, 16, 3\]"):
        classifier_features(np.zeros((2, 16, 16, 3), np.uint8))


@pytest.mark.parametrize("steps", [1, 2, 5, 6])
def test_a_few_steps_are_enough(tmp_path, steps):
    cats = folders(tmp_path / "cats", cat=2, dog=2)
    flags = ["--data", cats, "--test", cats, "--epochs", str(steps), "--batch-size", "4", "--device", "cpu"]
    with torch.enable_grad():
        classifier.main(classifier.parse([*flags, "--out", str(tmp_path / "c.pt")]))
    assert (tmp_path / "c.pt").exists()
