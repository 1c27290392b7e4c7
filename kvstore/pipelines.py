"""Pipelines that plans name, each built once, and the calibration that they need."""

from collections.abc import Iterable

from kvstore.codecs import Pipeline, build_pipeline, named_pipeline
from kvstore.controller.tables import renewed
from kvstore.header import profile_id
from kvstore.plan import Action, Plan
from kvstore.service import Service

_PIPELINES_MAX = 64


class Pipelines:
    """What a client encodes and decodes with.

    Args:
        service: Has the calibration of profiles.
        configured: How to encode where nothing is planned.
        artefacts: Calibration that is here already, by digest; what comes is added to it.
    """

    def __init__(self, service: Service, configured: Pipeline, artefacts: dict[str, bytes]) -> None:
        self._service = service
        self._configured = configured
        self.artefacts = artefacts
        self._built: dict[bytes, Pipeline] = {}

    async def learn(self, namespace: bytes, digests: Iterable[str]) -> None:
        """Get calibration that is not here.

        Raises:
            BackendError: The server cannot be asked.
            PipelineError: It does not have it.
        """
        missing = [digest for digest in digests if digest not in self.artefacts]
        if missing:
            found = await self._service.artefacts(namespace, missing)
            self.artefacts.update({digest: found[digest] for digest in missing})

    async def of(self, namespace: bytes, plan: Plan) -> Pipeline:
        """How to encode what a plan of a put is for.

        Raises:
            BackendError: The server cannot be asked for calibration.
            PipelineError: It does not have it, or this build has no such stage.
        """
        if plan.action is Action.STATIC:
            return self._configured
        if plan.pipeline is None:
            return self._configured if self._configured.lossless else named_pipeline("raw")
        identity = profile_id(plan.pipeline)
        if identity not in self._built:
            await self.learn(namespace, plan.artefacts)
            built = build_pipeline(plan.pipeline, self.artefacts)
            renewed(self._built, identity, _PIPELINES_MAX, lambda: built)
        return self._built[identity]
