"""What the comparisons of ``train/experiments`` share; the library does not need it.

    fit        one training loop for all of them, and the alignment of a gradient with the exact one
    methods    ways to train: over depth (``depth_methods``) and over time (``time_methods``)
    tasks      what is learned: batches, and the figures of a model; images are in ``image_task``
    runs       one run of a method on a task: what the file of results stores
    results    that file, the learning rates that its runs decide, and what is run
    words      reads the names that older files of results use
    report     tables; of images ``image_report``
    plots      figures
    program    what every script does around its main: mistakes and exit codes
    fused      torch's fused recurrent layers as a baseline of speed; ``fused_bptt`` trains with one
    turns      steps of several methods timed by turns
    equal_time figures at equal time and equal work, and ``statistics`` of few seeds
    code_text  the source of SymPy as a text
    digits     MNIST with images held out; ``mlp`` sigmoid MLPs on it, ``digits_table`` all that is stored of it over time
    paper      the figures that the paper prints
    gpu_*      the cells, steps and report of ``gpu.py``
    parallel_* methods, processes and report of ``bench_parallel.py``; ``group`` starts its processes, ``wire`` counts what
               they send and slows it down; ``sequence_methods`` are those of ``bench_sequence.py``
    scaling_*  costs of a step's parts, and what ``scaling.py`` predicts from them
"""
