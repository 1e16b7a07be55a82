# What `cmake --install` lays down, with a CMake package that has no path of the build in it:
#   bin/sluice  lib/libsluice.so  lib/sluice/ (transports loaded on demand)  include/sluice/  lib/cmake/Sluice/
# The rooms' archives are inside libsluice.so and no part of the package.
include(CMakePackageConfigHelpers)

install(TARGETS sluice EXPORT SluiceTargets LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
if(TARGET sluice_program)
  install(TARGETS sluice_program RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
endif()
if(TARGET sluice_comm_mpi)
  # The path of an MPI outside the default places stays known.
  set_target_properties(sluice_comm_mpi PROPERTIES INSTALL_RPATH_USE_LINK_PATH ON)
  install(TARGETS sluice_comm_mpi LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}/sluice)
endif()

if(TARGET sluice_comm_ucx)
  set_target_properties(sluice_comm_ucx PROPERTIES INSTALL_RPATH_USE_LINK_PATH ON)
  install(TARGETS sluice_comm_ucx LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}/sluice)
endif()

# The public headers, and what they include of the rooms.
set(sluice_include_dir ${CMAKE_INSTALL_INCLUDEDIR}/sluice)
install(FILES
  runtime/include/sluice/chain_layer.hpp
  runtime/include/sluice/dispatcher.hpp
  runtime/include/sluice/gpu_moe_layer.hpp
  runtime/include/sluice/moe_layer.hpp
  runtime/include/sluice/runtime.hpp
  runtime/include/sluice/sluice.h
  DESTINATION ${sluice_include_dir})
install(FILES
  base/clock.hpp base/dtype.hpp base/error.hpp base/grow_array.hpp base/ids.hpp base/log.hpp base/telemetry.hpp
  base/tensor_view.hpp base/topology.hpp
  DESTINATION ${sluice_include_dir}/base)
install(FILES
  scheduler/choose_schedule.hpp scheduler/cost_model.hpp scheduler/placement.hpp scheduler/plan.hpp
  scheduler/plan_summary.hpp scheduler/routing.hpp scheduler/selection.hpp scheduler/simulator.hpp
  scheduler/template.hpp
  DESTINATION ${sluice_include_dir}/scheduler)

set(sluice_package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/Sluice)
install(EXPORT SluiceTargets NAMESPACE sluice:: DESTINATION ${sluice_package_dir})
configure_package_config_file(cmake/SluiceConfig.cmake.in "${PROJECT_BINARY_DIR}/SluiceConfig.cmake"
  INSTALL_DESTINATION ${sluice_package_dir} NO_SET_AND_CHECK_MACRO)
# Before 1.0 a minor version may change the interface.
if(PROJECT_VERSION_MAJOR EQUAL 0)
  set(sluice_compatibility SameMinorVersion)
else()
  set(sluice_compatibility SameMajorVersion)
endif()
write_basic_package_version_file("${PROJECT_BINARY_DIR}/SluiceConfigVersion.cmake"
  VERSION ${PROJECT_VERSION} COMPATIBILITY ${sluice_compatibility})
install(FILES "${PROJECT_BINARY_DIR}/SluiceConfig.cmake" "${PROJECT_BINARY_DIR}/SluiceConfigVersion.cmake"
  DESTINATION ${sluice_package_dir})
install(FILES LICENSE DESTINATION ${CMAKE_INSTALL_DOCDIR})
