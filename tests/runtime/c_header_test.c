// The header is C11 by itself: this file includes nothing before it. Called by c_api_test.cpp.
#include "sluice/sluice.h"
#include "sluice/sluice.h"  // guarded

int sluice_c_header_test(void);

// Makes one rank, one layer without tokens, and takes it all down again. 0 when all is well, else the number of the
// step that failed.
int sluice_c_header_test(void) {
  sluice_topology topology = SLUICE_INIT(sluice_topology);
  sluice_group* group = NULL;
  sluice_runtime* runtime = NULL;
  sluice_placement placement = SLUICE_INIT(sluice_placement);
  sluice_layer_options options = SLUICE_INIT(sluice_layer_options);
  sluice_layer* layer = NULL;
  const int32_t zero_expert = SLUICE_EXPERT_ZERO;

  topology.num_ranks = 1;
  if (sluice_group_create_local(&topology, NULL, &group) != SLUICE_OK) return 1;
  if (sluice_group_take_runtime(group, 0, &runtime) != SLUICE_OK) return 2;
  placement.num_experts = 1;
  placement.expert_kind = &zero_expert;
  options.hidden = 4;
  options.ffn = 4;
  if (sluice_layer_create(runtime, &placement, &options, &layer) != SLUICE_OK) return 3;
  if (sluice_layer_set_weights(layer, NULL, 0) != SLUICE_OK) return 4;
  sluice_runtime_destroy(runtime);
  sluice_group_destroy(group);
  sluice_layer_destroy(layer);
  return 0;
}
