"""Fused models refuse versions of transformers that they cannot run with."""

import pytest

from bertfast.architectures.supported_versions import require_supported_version


@pytest.mark.parametrize("version", ["4.57.0", "4.57.6", "5.2.0", "5.24.0", "5.25.0.dev0"])
def test_supported_versions_are_taken(version):
    require_supported_version(version)


@pytest.mark.parametrize("version", ["4.56.2", "5.0.0", "5.0.0rc1", "5.1.0", "6.0.0"])
def test_other_versions_are_refused_with_the_command_that_installs_one(version):
    with pytest.raises(ImportError, match=rf"{version} is installed: pip install"):
        require_supported_version(version)
