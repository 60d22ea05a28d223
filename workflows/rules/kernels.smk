# snakemake -c1 kernels: time, bytes and ratios to the baselines of every kernel on this machine, as a table and as JSON
rule kernels:
    output:
        json="results/kernels.json",
    log:
        "results/logs/kernels.log",
    threads: 1
    params:
        code=code_digest(*(f"fedpipe.kernels.{op}" for op in OPS)),
    shell:
        "python -m pytest -q benchmarks/kernels --benchmark-only --benchmark-columns=median,rounds"
        " --benchmark-json {output.json} 2>&1 | tee {log}"
