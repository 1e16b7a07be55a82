// From configuration to the options of layers.
#pragma once

#include <memory>
#include <string>

#include "sluice/base/config.hpp"
#include "sluice/chain_layer.hpp"
#include "sluice/kernels/kernels.hpp"
#include "sluice/moe_layer.hpp"

namespace sluice {

// Of one layer; expert kinds in the order of the configuration: ffn, zero, copy, constant. Reads placement.file where the
// policy is file; throws kNotFound or kInvalidConfig when it does not fit the model or the ranks.
Placement placement_of(const Config& config, std::int32_t num_ranks, std::int32_t layer = 0);
// Throws kInvalidConfig where placement.file has neither one layer nor `num_layers` (0: any number of them). Where `warns`,
// says that it was planned for other nodes.
void check_placement_file(const Config& config, const Topology& topology, std::int32_t num_layers,
                          bool warns);
MoeLayerOptions layer_options(const Config& config);
ChainLayerOptions chain_options(const Config& config);
// The configured policy over the layer's placement.
std::unique_ptr<SelectionPolicy> policy_of(const Config& config, const Topology& topology,
                                           std::int32_t layer = 0);
// Throws kInvalidArgument for a value that is none.
kernels::Activation kernel_activation(ExpertActivation activation);
std::int64_t preactivation_cols(const MoeLayerOptions& options);
// What the cost model needs of a layer's options.
LayerShape layer_shape(const MoeLayerOptions& options, std::int32_t threads_per_rank);
// As reports print hashes: 16 hexadecimal digits.
std::string hash_text(std::uint64_t hash);

}  // namespace sluice
