// A machine whose costs are easy to add up by hand.
#pragma once

#include "sluice/scheduler/cost_model.hpp"

namespace sluice::testing {

// Rows of 10 floats. A row: gather 0.25 us (80 bytes read and written), reduce 0.25 us a row read or written, GEMM 1
// takes 2 us, GEMM 2 takes 1 us, and 2.5 us on either link, 5 us latency. Messages and ops are free.
inline LayerShape tiny_layer() {
  LayerShape layer;
  layer.hidden = 10;
  layer.ffn = 10;
  layer.pre_cols = 20;
  return layer;
}

inline MachineProfile tiny_profile() {
  MachineProfile p;
  p.name = "tiny";
  p.source = "made up";
  for (LinkProfile* l : {&p.in_node, &p.across_nodes}) {
    l->occupied = Curve({{0, 0}, {160, 10}});
    l->latency_us = 5;
  }
  p.gather = Curve::line(0, 320);
  p.reduce = Curve::line(0, 160);
  p.activation_backward = Curve::line(0, 320);
  const LayerShape layer = tiny_layer();
  for (const GemmKind kind : {GemmKind::kForward, GemmKind::kDgrad, GemmKind::kWgrad}) {
    p.gemms.push_back({layer.gemm1(kind), Curve({{1, 2}, {1001, 2002}})});
    p.gemms.push_back({layer.gemm2(kind), Curve({{1, 1}, {1001, 1001}})});
  }
  return p;
}

}  // namespace sluice::testing
