import pytest


@pytest.fixture(scope="session")
def cliff():
    from holdfast.models.loading.load import load_language_model
    from holdfast.organisms.catalogue import resolve

    return load_language_model(str(resolve("cliff")))
