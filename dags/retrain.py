"""Train a candidate, compare it with the champion, and promote it if the gate says so."""

from datetime import timedelta
from typing import Any

from airflow.sdk import Param, TriggerRule, dag, task
from notifications import Announcement
from orchestration import (
    CHAMPION,
    COMMENT,
    DEFAULT_ARGS,
    LEARNING_DEADLINE,
    SCORING_QUEUE,
    SINCE,
    TELL,
    TRAINING_DATA,
    Approve,
    DecisionLink,
    ModelCardLink,
    ReportLink,
    TensorBoardLink,
    at_hours,
    progress_log,
)

_LONGEST = timedelta(hours=24)
DOC = """
### Train, evaluate, gate, approve, promote

Every night at 01:00 UTC, and by hand. **check_need** skips the run, saying why, when neither the
data nor the recipe changed since the last candidate, and that one need not be judged once more.
Candidate and champion are measured on the same frozen holdout; **gate** judges by the rules of a
policy and loads the stored model once more in a fresh process. Only a candidate that passes becomes
champion: at once, after a person has said yes (**approve** waits under *Required Actions*, and no
answer in time is a no), or by hand.
**package** then makes it ready for the fast engines; until then it scores with the reference.
A rejection is a result: the run stays green and what follows is skipped.

The *Verdict* tab of a run shows what was decided, rule by rule. The *Report* button on the
*Details* tab of the evaluation tasks opens the numbers and the worst pictures, the *TensorBoard*
button of **train** the curves.
"""


@dag(
    schedule=at_hours("0 1 * * *"),
    start_date=SINCE,
    catchup=False,
    max_active_runs=1,
    default_args=DEFAULT_ARGS,
    on_failure_callback=TELL,
    deadline=LEARNING_DEADLINE,
    tags=["gun-detection", "training"],
    doc_md=DOC,
    params={
        "preset": Param(
            None,
            type=["null", "string"],
            enum=[None, "smoke", "demo", "cpu", "gpu", "seed"],
            values_display={
                "null": "as configured",
                "smoke": "smoke: seconds, learns nothing",
                "demo": "demo: minutes, drawn pictures only",
                "cpu": "cpu: real pictures, hours on a CPU",
                "gpu": "gpu: real pictures, on a GPU",
                "seed": "seed: the tutorial recipe, to compare with",
            },
            title="Preset",
            description="Named recipe.",
        ),
        "overrides": Param(
            {},
            type="object",
            title="Changes to the recipe",
            description='Values instead of the preset\'s, for example {"epochs": 20}.',
        ),
        "dataset_id": Param(
            None,
            type=["null", "string"],
            title="Data set version",
            description="Empty for the newest.",
        ),
        "force": Param(
            False,
            type="boolean",
            title="Train although nothing changed",
            description="Otherwise a run with the same data and recipe is skipped.",
        ),
        "policy": Param(
            None,
            type=["null", "string"],
            examples=["standard", "trial"],
            title="Rules of the gate",
            description="standard, trial, or the path of a YAML file; empty for the configured "
            "policy.",
        ),
        "promotion": Param(
            None,
            type=["null", "string"],
            enum=[None, "auto", "approve", "manual"],
            values_display={
                "null": "as configured",
                "auto": "auto: promote what passes",
                "approve": "approve: ask a person",
                "manual": "manual: promote on the command line",
            },
            title="Promotion",
            description="What happens to a candidate that passes. Where there is a caution, auto "
            "asks a person, too.",
        ),
    },
)
def retrain() -> None:
    @task(inlets=[TRAINING_DATA])
    def check_need(params: dict[str, Any] | None = None, dag_run: Any = None) -> dict[str, Any]:
        """Skip the run when there is nothing new to learn from."""
        from airflow.sdk.exceptions import AirflowSkipException

        from gun_detection import stages
        from gun_detection.errors import NotFoundError
        from gun_detection.settings import load_settings

        assert params is not None
        try:
            need = stages.check_need(
                load_settings(),
                params["dataset_id"],
                params["preset"],
                params["overrides"],
                params["policy"],
            )
        except NotFoundError as error:
            # The nights before the first data came are no failures.
            if error.reason == "NO_DATASET" and dag_run.run_type == "scheduled":
                raise AirflowSkipException(error.message) from error
            raise
        print(need["reason"])
        if not need["needed"] and not params["force"]:
            raise AirflowSkipException(need["reason"])
        return need

    @task(pool="gpu", queue="gpu", execution_timeout=_LONGEST)
    def train(
        need: dict[str, Any], params: dict[str, Any] | None = None, ti: Any = None
    ) -> dict[str, Any]:
        """Train on the data set and keep the best epoch as a candidate.

        A retry goes on from the last checkpoint of the attempt before.
        """
        from gun_detection import stages
        from gun_detection.settings import load_settings

        assert params is not None
        log = progress_log("step")
        return stages.train(
            load_settings(),
            need["dataset_id"],
            params["preset"],
            params["overrides"],
            lambda now: log(
                now.step,
                now.steps,
                f", epoch {now.epoch}, loss {now.loss:.3f}, {now.images_per_second:.1f} images/s",
            ),
            again=params["force"],
            resume=not params["force"] or ti.try_number > 1,
        )

    @task(pool="gpu", queue="gpu", execution_timeout=_LONGEST)
    def evaluate_candidate(trained: dict[str, Any]) -> dict[str, Any]:
        """Measure the candidate on the frozen holdout."""
        from gun_detection import stages
        from gun_detection.settings import load_settings

        return stages.evaluate(load_settings(), trained["model_id"], trained["dataset_id"])

    @task(pool="gpu", queue="gpu", execution_timeout=_LONGEST)
    def evaluate_champion(trained: dict[str, Any]) -> dict[str, Any]:
        """Measure the champion on the same holdout; skipped where there is none yet."""
        from airflow.sdk.exceptions import AirflowSkipException

        from gun_detection import stages
        from gun_detection.errors import NotFoundError
        from gun_detection.settings import load_settings

        try:
            return stages.evaluate(load_settings(), "champion", trained["dataset_id"])
        except NotFoundError as error:
            if error.reason != "NO_CHAMPION":
                raise
            raise AirflowSkipException("no champion yet: there is only the floor to pass") from None

    # A skipped champion is no reason to skip the gate; a skipped training is.
    @task(
        pool="gpu",
        queue="gpu",
        execution_timeout=_LONGEST,
        trigger_rule=TriggerRule.NONE_FAILED_MIN_ONE_SUCCESS,
        on_success_callback=Announcement("rejected", "gate"),
    )
    def gate(
        trained: dict[str, Any],
        params: dict[str, Any] | None = None,
        run_id: str | None = None,
    ) -> dict[str, Any]:
        """Judge the candidate by the policy and record the decision with its reasons."""
        from gun_detection import stages
        from gun_detection.settings import load_settings

        assert params is not None
        decision = stages.gate(
            load_settings(),
            trained["model_id"],
            trained["dataset_id"],
            params["policy"],
            origin=f"airflow:retrain:{run_id}",
            promotion=params["promotion"],
        )
        print(decision["explanation"])
        return decision

    @task(outlets=[CHAMPION], on_success_callback=Announcement("promoted", "gate"))
    def promote(
        decision: dict[str, Any],
        approval: dict[str, Any],
        run_id: str | None = None,
        outlet_events: Any = None,
    ) -> dict[str, Any]:
        """Make the candidate champion, in the name of whoever approved it."""
        from gun_detection import stages
        from gun_detection.settings import load_settings

        run = f"airflow:retrain:{run_id}"
        said = f"{approval['comment']} — " if approval["comment"] else ""
        promoted = stages.promote(
            load_settings(),
            decision["candidate_id"],
            actor=f"{approval['actor']}, in {run}" if approval["actor"] else run,
            reason=said + decision["explanation"],
            decision_id=decision["decision_id"],
        )
        outlet_events[CHAMPION].extra = promoted | {"verdict": decision["explanation"]}
        return promoted

    # It makes what the machine that it runs on can use: it has to be one that scores.
    @task(pool="gpu", queue=SCORING_QUEUE, execution_timeout=_LONGEST)
    def package(promoted: dict[str, Any]) -> dict[str, Any]:
        """Make the champion ready for the fast engines; one that finds less is refused."""
        from gun_detection import stages
        from gun_detection.settings import load_settings

        made = stages.package(
            load_settings(), promoted["champion_id"], None, progress_log("checked")
        )
        for row in made["packages"]:
            print(
                f"{row['engine']}: {'accepted' if row['accepted'] else 'refused'}, {row['reason']}"
            )
        return made

    trained = train(check_need())
    candidate, champion = evaluate_candidate(trained), evaluate_champion(trained)
    decision = gate(trained)
    [candidate, champion] >> decision
    approve = Approve(task_id="approve", gate_task="gate", params=COMMENT)
    decision >> approve
    promoted = promote(decision, approve.output)
    package(promoted)
    trained.operator.operator_extra_links = (TensorBoardLink(),)
    candidate.operator.operator_extra_links = (ReportLink(),)
    champion.operator.operator_extra_links = (ReportLink(),)
    decision.operator.operator_extra_links = (DecisionLink(), ReportLink())
    promoted.operator.operator_extra_links = (ModelCardLink(),)


retrain()
