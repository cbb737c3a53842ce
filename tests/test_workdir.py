import errno

import pytest

from vit_jax import train
from vit_jax.errors import UserError
from vit_jax.workdir import full_disk


def test_a_workdir_that_cannot_be_written_is_refused(tiny_config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/run is not writable .*choose another --workdir"):
        train.train(tiny_config(), tmp_path / "file/run")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
def test_a_full_disk_is_a_users_error_with_the_way_out(tmp_path, number):
    with pytest.raises(UserError, match="cannot be written: .*; free space and run the same"):  # noqa: SIM117
        with full_disk(tmp_path):
            raise OSError(number, "full")


def test_other_errors_of_the_system_are_no_full_disk(tmp_path):
    with pytest.raises(OSError, match="gone"), full_disk(tmp_path):
        raise OSError(errno.EIO, "gone")
