# ruff: noqa: E501 (lines of programs are as long as XLA makes them)
"""Collectives are counted as the text of a compiled program has them: with loops multiplied in, each chain once."""

import pytest

from sora_jax.planner.hlo import Collective, Program, totals

# As XLA writes programs for CPUs (trips told) and for TPUs (a bound compared with, starts, fusions, chains).
HEAD = "HloModule jit_step, is_scheduled=true, replica_count=1, num_partitions=8\n"
LOOPS = (
    HEAD
    + """
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%inner_body (p: (s32[], f32[4,6])) -> (s32[], f32[4,6]) {
  %there = f32[4,6]{1,0} collective-permute(%x), channel_id=1, source_target_pairs={{0,1},{1,0},{2,3},{3,2}}
}

%inner_condition (p: (s32[], f32[4,6])) -> pred[] {
  %n = s32[]{:T(128)} constant(3)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT, metadata={op_name="while/cond/lt"}
}

%outer_body (p: (s32[], f32[4,6])) -> (s32[], f32[4,6]) {
  %inner = (s32[], f32[4,6]) while(%t), condition=%inner_condition, body=%inner_body
  %sum = (f32[8]{0}, bf16[2,3]{1,0}) all-reduce(%a, %b), replica_groups=[4,2]<=[8], to_apply=%add
}

%outer_condition (p: (s32[], f32[4,6])) -> pred[] {
  ROOT %wrapped = pred[] fusion(%i, %n), kind=kLoop, calls=%compare
}

%one (p: f32[8]) -> f32[8] {
  %pieces = (s32[2]{0}, s32[2]{0}) all-to-all(%a, %b), replica_groups={{0,1},{2,3},{4,5},{6,7}}
}

%other (p: f32[8]) -> f32[8] {
  ROOT %same = f32[8] copy(%p)
}

%searching (p: s32[]) -> pred[] {
  ROOT %found = pred[] compare(%i, %bound), direction=LT
}

%search (p: s32[]) -> s32[] {
  %all = pred[16]{0} all-gather(%q), replica_groups={}, dimensions={0}
}

ENTRY %main (p: f32[4,6]) -> f32[4,6] {
  %loop = (s32[], f32[4,6]) while(%t), condition=%outer_condition, body=%outer_body, backend_config={"known_trip_count":{"n":"5"}}
  %either = f32[8] conditional(%index, %a, %b), branch_computations={%one, %other}
  %looked = s32[] while(%s), condition=%searching, body=%search
}
"""
)
MESH = "replica_groups=mesh['data'=2,'fsdp'=2,'tensor'=2]"
TPU = (
    HEAD
    + f"""
%begin (p: bf16[8,16]) -> (bf16[8,16], bf16[32,16]) {{
  %all-gather.1 = bf16[32,16]{{1,0:T(8,128)(2,1)}} all-gather(%p), channel_id=7, {MESH} {{'data','fsdp'}}, dimensions={{0}}, frontend_attributes={{chain_id="0"}}
}}

%end (p: bf16[8,16]) -> bf16[32,16] {{
  %all-gather.2 = bf16[32,16]{{1,0:T(8,128)(2,1)S(1)}} all-gather(%p), channel_id=7, {MESH} {{'data','fsdp'}}, dimensions={{0}}, frontend_attributes={{chain_id="0"}}
}}

%all-reduce-scatter.3 (p: f32[64]) -> f32[8] {{
  %summed = f32[64]{{0}} all-reduce(%p), channel_id=3, replica_groups={{{{0,1,2,3,4,5,6,7}}}}, to_apply=%add
}}

%wrapped (p: f32[4]) -> f32[2] {{
  ROOT %scattered = f32[2]{{0}} reduce-scatter(%p), {MESH} {{'tensor':(1)2}}, dimensions={{0}}, to_apply=%add
}}

ENTRY %main (p: bf16[8,16]) -> bf16[32,16] {{
  %kernel = f32[8] custom-call(%p), backend_config={{"text":"
}}}}, {{"}}
  %first = (bf16[8,16], bf16[32,16]) fusion(%p), kind=kCustom, calls=%begin
  %last = bf16[32,16] fusion(%first), kind=kCustom, calls=%end
  %part = f32[8] fusion(%g), kind=kCustom, calls=%all-reduce-scatter.3
  %sent = (f32[4,8]{{1,0}}, f32[4,8]{{1,0}}, u32[]{{:S(2)}}, u32[]{{:S(2)}}) collective-permute-start(%v), source_target_pairs={{{{0,1}},{{1,2}},{{2,0}}}}
  %here = f32[4,8]{{1,0}} collective-permute-done(%sent)
  %gathering = (f32[2]{{0}}, f32[16]{{0}}) all-gather-start(%w), replica_groups=[1,8]<=[8], dimensions={{0}}
  %gathered = f32[16]{{0}} all-gather-done(%gathering)
  %late = ((f32[4]), f32[2], s32[]) async-start(%x), calls=%wrapped
  %done = f32[2] async-done(%late), calls=%wrapped
}}
"""
)


def test_loops_multiply_and_branches_count():
    found = {one.kind: one for one in Program(LOOPS).collectives}
    assert found["collective-permute"] == Collective("collective-permute", 4 * 6 * 4, 2, 5 * 3)
    assert found["all-reduce"] == Collective("all-reduce", 8 * 4 + 6 * 2, 2, 5)
    assert found["all-to-all"] == Collective("all-to-all", 16, 2, 1)
    assert found["all-gather"] == Collective("all-gather", 16, 8, 1, known=False)


def test_what_tpus_run_beside_other_work_is_counted_once():
    found = sorted(Program(TPU).collectives, key=lambda one: (one.kind, one.bytes))
    assert found == [
        Collective("all-gather", 16 * 4, 8, 1),
        Collective("all-gather", 32 * 16 * 2, 4, 1),
        Collective("collective-permute", 4 * 8 * 4, 3, 1),
        Collective("reduce-scatter", 2 * 2 * 4, 2, 1),
        Collective("reduce-scatter", 64 * 4, 8, 1),
    ]


def test_totals_and_what_is_sent():
    found = [
        Collective("all-reduce", 80, 4, 3),
        Collective("all-reduce", 8, 2, 1),
        Collective("all-gather", 8, 4, 2),
    ]
    assert totals(found) == {"all-reduce": (4, 248), "all-gather": (2, 16)}
    assert [one.sent for one in found] == pytest.approx([120, 8, 6])
    assert Collective("collective-permute", 80, 4, 1).sent == 80
