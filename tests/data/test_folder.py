"""Image folders: what is read, in which order, and what is refused."""

import pytest

from vit_jax.data.datasets import open_dataset
from vit_jax.data.pipeline import eval_batches, train_batches
from vit_jax.data.protocols import evaluation
from vit_jax.errors import UserError


def ids(source):
    return [record["id"].numpy().decode() for record in source.records()]


def test_classes_are_sorted_directories_and_labels_index_them(image_folder):
    train, test = open_dataset(f"folder:{image_folder}")
    assert train.class_names == test.class_names == ("aster", "rose")
    assert (train.num_examples, test.num_examples) == (40, 6)
    assert train.num_bytes == sum(p.stat().st_size for p in (image_folder / "train").rglob("*.jpg"))
    for record in train.records():
        path = record["id"].numpy().decode()
        assert path.split("/")[-2] == train.class_names[int(record["label"])]
        with open(path, "rb") as file:
            assert record["image"].numpy() == file.read()


def test_slices_are_disjoint_complete_and_mixed(image_folder):
    name = f"folder:{image_folder}"
    first, rest = open_dataset(name, train_split="train[:75%]", eval_split="train[75%:]")
    whole, _ = open_dataset(name)
    assert (first.num_examples, rest.num_examples) == (30, 10)
    assert ids(first) + ids(rest) == ids(whole)
    assert sorted(ids(whole)) == sorted(str(p) for p in (image_folder / "train").rglob("*.jpg"))
    assert {path.split("/")[-2] for path in ids(rest)} == {"aster", "rose"}


def test_order_does_not_depend_on_where_the_folder_is(image_folder):
    name = f"folder:{image_folder}"
    before = [path.removeprefix(str(image_folder)) for path in ids(open_dataset(name)[0])]
    moved = image_folder.rename(image_folder.with_name("moved"))
    after = [path.removeprefix(str(moved)) for path in ids(open_dataset(f"folder:{moved}")[0])]
    assert before == after


def test_development_holds_out_a_tenth_of_train(image_folder):
    (image_folder / "test").rename(image_folder / "unused")
    train, held_out = open_dataset(f"folder:{image_folder}", development=True)
    assert (train.num_examples, held_out.num_examples) == (36, 4)
    assert not set(ids(train)) & set(ids(held_out))


@pytest.mark.parametrize("name", ["val", "validation"])
def test_validation_may_be_called_val(image_folder, name):
    (image_folder / "test").rename(image_folder / name)
    assert open_dataset(f"folder:{image_folder}")[1].split == "validation"


def test_hidden_files_are_ignored(image_folder):
    (image_folder / "train" / ".cache").mkdir()
    (image_folder / "train" / "rose" / ".DS_Store").write_bytes(b"x")
    assert open_dataset(f"folder:{image_folder}")[0].num_examples == 40


def refuse(folder, **options):
    with pytest.raises(UserError) as caught:
        open_dataset(f"folder:{folder}", **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_missing_folder_is_named(tmp_path):
    assert "nowhere" in refuse(tmp_path / "nowhere")


def test_folder_without_train_is_named(image_folder):
    (image_folder / "train").rename(image_folder / "training")
    assert "no train/" in refuse(image_folder)


def test_folder_without_evaluation_split_says_what_it_has(image_folder):
    (image_folder / "test").rename(image_folder / "unused")
    assert "only train" in refuse(image_folder)


def test_folder_without_classes_is_refused(tmp_path):
    (tmp_path / "train").mkdir()
    assert "no classes" in refuse(tmp_path)


def test_empty_class_is_named(image_folder):
    (image_folder / "train" / "lily").mkdir()
    assert "train/lily is empty" in refuse(image_folder)


def test_test_class_unknown_to_train_is_named(image_folder):
    (image_folder / "test" / "aster").rename(image_folder / "test" / "lily")
    assert "'lily'" in refuse(image_folder)


def test_file_that_is_no_image_is_named(image_folder):
    (image_folder / "test" / "rose" / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    assert "rose/Thumbs.db" in refuse(image_folder)


def test_empty_and_unknown_splits_are_named(image_folder):
    assert "'train[:0%]'" in refuse(image_folder, train_split="train[:0%]")
    unknown = refuse(image_folder, eval_split="tset")
    assert "'tset'" in unknown and "train, test" in unknown


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_truncated_image_is_named_when_training_reaches_it(image_folder, cache):
    broken = image_folder / "train" / "rose" / "7.jpg"
    broken.write_bytes(broken.read_bytes()[:-200])
    train, _ = open_dataset(f"folder:{image_folder}")
    batches = train_batches(
        train,
        batch_size=4,
        image_size=16,
        protocol="bit",
        random_crop=False,
        random_flip=False,
        seed=0,
        shuffle_buffer=10,
        cache=cache,
    )
    with pytest.raises(UserError, match=str(broken)):
        for _ in range(10):
            next(batches)


def test_truncated_image_is_named_by_evaluation_on_the_process_that_owns_it(image_folder):
    broken = image_folder / "test" / "aster" / "1.jpg"
    broken.write_bytes(broken.read_bytes()[:-200])
    _, test = open_dataset(f"folder:{image_folder}")
    messages = []
    for process in range(2):
        batches = eval_batches(
            test,
            batch_size=4,
            preprocessing=evaluation("bit", image_size=16),
            process_index=process,
            process_count=2,
        )
        try:
            list(batches)
        except UserError as error:
            messages.append(str(error))
    assert len(messages) == 1 and str(broken) in messages[0]


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_a_file_that_has_gone_is_named(image_folder, cache):
    train, _ = open_dataset(f"folder:{image_folder}")
    gone = next((image_folder / "train").rglob("*.*"))
    gone.unlink()
    options = {"image_size": 8, "protocol": "pad", "random_crop": True, "random_flip": False}
    with pytest.raises(UserError, match="the data cannot be read") as error:
        batches = train_batches(
            train, batch_size=2, seed=0, shuffle_buffer=10, cache=cache, **options
        )
        for _ in range(train.num_examples):
            next(batches)
    assert gone.name in str(error.value)
