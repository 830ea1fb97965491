"""The API against its own OpenAPI document: every check that schemathesis has, on requests that it makes up.

A request that the document allows may be refused with 400, for rules over several fields and for what the model cannot.
Otherwise what is valid is taken, and what is not is refused.
"""

from __future__ import annotations

import pytest
import schemathesis
from schemathesis import engine
from schemathesis.config import SchemathesisConfig

from dsa_engine.serving.http.app import create_app
from dsa_engine.serving.settings import Settings
from tests.support.fake_backend import FakeBackend

PHASES = {"coverage": 1, "fuzzing": 40, "stateful": 15}  # examples of each
JOBS = {
    "POST /v1/videos",
    "GET /v1/videos",
    "GET /v1/videos/{id}",
    "DELETE /v1/videos/{id}",
    "GET /v1/videos/{id}/content",
}
OTHERS = {"GET /v1/models", "GET /metrics", "GET /health", "GET /readyz"}  # which follow from nothing


@pytest.fixture
def app(tmp_path):
    return create_app(FakeBackend(), Settings(data=tmp_path, token="secret"))


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_the_document_is_true(app, phase):
    config = SchemathesisConfig.from_dict(
        {
            "headers": {"Authorization": "Bearer secret"},
            "generation": {"max-examples": PHASES[phase], "deterministic": True},
            "phases": {name: {"enabled": name == phase} for name in ("examples", *PHASES)},
            "checks": {"positive_data_acceptance": {"expected-statuses": ["2xx", 400, 401, 403, 404, 409]}},
        }
    )
    schema = schemathesis.openapi.from_asgi("/openapi.json", app, config=config)
    found, cases, seen, statuses = [], 0, set(), set()
    for event in engine.from_schema(schema).execute():
        assert not isinstance(event, engine.events.NonFatalError | engine.events.FatalError), event
        if not isinstance(event, engine.events.ScenarioFinished):
            continue
        for id, case in event.recorder.cases.items():
            cases += 1
            seen.add(f"{case.value.method} {case.value.path}")
            interaction = event.recorder.interactions.get(id)
            statuses |= {interaction.response.status_code} if interaction and interaction.response else set()
            for check in event.recorder.checks.get(id, ()):
                if check.failure_info is not None:
                    failure = check.failure_info.failure
                    found.append(f"{check.name}: {failure.message}\n{case.value.as_curl_command()}")
    assert not found, "\n\n".join(found[:5])
    assert seen >= (JOBS if phase == "stateful" else JOBS | OTHERS) and cases > 50  # it did look
    assert {200, 404} <= statuses and not statuses & {500, 503, 507}
