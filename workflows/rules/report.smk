rule table:
    input:
        study=STUDY.spec,
        results=results_of_runs,
    output:
        table=STUDY.table,
    log:
        f"{OUT}/logs/table.log",
    threads: 1
    params:
        code=step_digest("table"),
        runs=[p.folder for p in RUNS.values()],
    shell:
        "fedpipe table --study {input.study} --runs {params.runs}" " --table {output.table} 2>&1 | tee {log}"


rule report:
    input:
        study=STUDY.spec,
        table=rules.table.output.table,
        results=results_of_runs,
    output:
        report=STUDY.report,
    log:
        f"{OUT}/logs/report.log",
    threads: 1
    params:
        code=step_digest("report"),
        runs=[p.folder for p in RUNS.values()],
    shell:
        "fedpipe report --study {input.study} --table {input.table}"
        " --runs {params.runs} --report {output.report} 2>&1 | tee {log}"
