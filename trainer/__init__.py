"""Training runs: what a run is, how it is built and how it goes; rooms for what it needs.

    train      parse the recipe, build, fit, finish; then the dense branch, where one is asked for
    build      data -> model -> ACDC (masks, phases) -> DeepSpeed engine -> the position to go on from
    loop       for each epoch:
                   set the learning rate
                   for each optimizer step:
                       acdc.before_step()                      acts where a phase begins
                       forward, backward, step                 for each micro-batch
                   evaluate, record
                   save the dense twin or the sparse model     where its last phase ends
                   save a checkpoint                           where one is due
    summary    result.json, the report, the closing table

The algorithm itself: sparsity.acdc. The flow of a batch: data.
"""
