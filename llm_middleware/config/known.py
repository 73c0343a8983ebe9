"""Names in LiteLLM's files that say nothing to this library: of its UI, its database, its callbacks and its
other endpoints (https://docs.litellm.ai/docs/proxy/config_settings). They are ignored, and told."""

from __future__ import annotations

from typing import Final

__all__ = ["GENERAL", "OTHER_CACHES", "ROUTER", "SETTINGS", "TOP"]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


TOP: Final = _names(
    """
    agent_list agents assistant_settings callback_settings claude_code_plugins files_settings
    finetune_settings guardrails guardrails_ai health_check_settings mcp_aliases mcp_servers mcp_tools
    policies policy_attachments prompts search_tools skills vector_store_registry vector_stores
    video_settings worker_registry
    """
)

SETTINGS: Final = _names(
    """
    LITELLM_DISABLE_STOP_SEQUENCE_LIMIT add_function_to_prompt add_user_information_to_llm_headers ai21_key
    aiohttp_trust_env aleph_alpha_key allow_dynamic_callback_disabling amazon_nova_api_key anthropic_key
    anthropic_prompt_caching_ttl api_base api_key api_version argilla_batch_size
    argilla_transformation_object audit_log_callbacks aws_sqs_callback_params azure_key banned_keywords_list
    baseten_key blocked_user_list budget_duration budget_exceeded_throttle_percentage bytez_key caching
    caching_with_models check_provider_endpoint clarifai_key cloudflare_api_key cohere_key
    cold_storage_custom_logger cometapi_key cost_discount_config cost_margin_config
    custom_prometheus_metadata_labels custom_prometheus_tags custom_prompt_dict custom_provider_map
    databricks_key datadog_llm_observability_params datadog_params datadog_use_v1 datarobot_key
    default_internal_user_params default_key_generate_params default_key_max_budget_alert_emails
    default_max_internal_user_budget default_redis_batch_cache_expiry default_soft_budget
    default_team_params default_team_settings disable_add_prefix_to_prompt
    disable_add_transform_inline_image_block disable_add_user_agent_to_request_tags
    disable_aiohttp_transport disable_aiohttp_trust_env disable_anthropic_gemini_context_caching_transform
    disable_copilot_system_to_assistant disable_end_user_cost_tracking
    disable_end_user_cost_tracking_prometheus_only disable_hf_tokenizer_download disable_stop_sequence_limit
    disable_streaming_logging disable_token_counter disable_vertex_batch_output_transformation
    dynamodb_table_name email enable_anthropic_prompt_caching enable_azure_ad_token_refresh
    enable_caching_on_provider_specific_optional_params enable_end_user_cost_tracking_prometheus_only
    enable_gemini_default_thinking_level_low enable_json_schema_validation
    enable_key_alias_format_validation enable_loadbalancing_on_batch_endpoints
    enable_model_config_credential_overrides enable_preview_features expose_router_debug_in_errors
    extra_spend_tag_headers filter_invalid_headers force_ipv4 forward_traceparent_to_llm_provider
    gcs_pub_sub_use_v1 gdc_api_base gdc_key gemini_live_defer_setup generic_api_use_v1
    generic_logger_headers gigachat_key google_moderation_confidence_threshold gradient_ai_api_key groq_key
    guardrail_name_config_map guardrails headers heroku_key huggingface_key in_memory_llm_clients_cache
    inception_key include_cost_in_streaming_usage infinity_key input_callback internal_user_budget_duration
    json_logs key_generation_settings langfuse_default_tags langsmith_batch_size lemonade_key llama_api_key
    llamaguard_model_name llamaguard_unsafe_content_categories llm_guard_mode log_raw_request_response
    logged_real_time_event_types logging maritalk_key max_budget max_end_user_budget max_end_user_budget_id
    max_internal_user_budget max_tokens max_ui_session_budget max_user_budget mcp_aliases
    mcp_semantic_tool_filter model_alias_map model_cost_map_url model_fallbacks model_group_settings
    modify_params nebius_key network_mock newrelic_params nlp_cloud_key novita_api_key
    num_retries_per_request ollama_key openai_key openai_like_key openai_moderations_model_name
    openrouter_key organization output_parse_pii overwrite_user_with_key_hash ovhcloud_key post_call_rules
    pre_call_rules predibase_key predibase_tenant_id presidio_ad_hoc_recognizers priority_reservation
    priority_reservation_settings project prometheus_emit_rate_limit_labels prometheus_emit_stream_label
    prometheus_end_user_metrics_cleanup_interval_seconds prometheus_end_user_metrics_max_series_per_metric
    prometheus_end_user_metrics_ttl_seconds prometheus_initialize_budget_metrics prometheus_latency_buckets
    prometheus_metrics_config prometheus_user_budget_label_include_email_alias
    provider_url_destination_allowed_hosts public_agent_groups public_mcp_hub_strict_whitelist
    public_mcp_servers public_model_groups public_model_groups_links reasoning_auto_summary
    redact_messages_in_exceptions redact_user_api_key_info replicate_key require_auth_for_metrics_endpoint
    require_managed_files retry return_response_headers route_all_chat_openai_to_responses
    s3_audit_callback_params s3_callback_params safe_memory_mode sap_service_key service_callback
    service_callbacks skip_system_message_in_guardrail skip_tool_message_in_guardrail snowflake_key
    ssl_ecdh_curve ssl_security_level standard_logging_payload_excluded_fields store_audit_logs
    strip_anthropic_total_tokens suppress_debug_info tag_budget_config telemetry togetherai_api_key token
    turn_off_message_logging upperbound_key_generate_params use_aiohttp_transport
    use_chat_completions_url_for_anthropic_messages use_client use_legacy_interactions_schema
    use_litellm_proxy user_url_allowed_hosts user_url_validation validate_end_user_id_in_db
    vercel_ai_gateway_key vertex_ai_safety_settings vertex_location vertex_project wandb_key xai_key
    """
)

ROUTER: Final = _names(
    """
    alerting_config assistants_config client_ttl debug_level default_priority
    deployment_affinity_ttl_seconds enable_health_check_routing enable_weighted_failover guardrail_list
    health_check_ignore_transient_errors health_check_staleness_threshold ignore_invalid_deployments
    max_retries model_group_affinity_config model_group_retry_policy optional_pre_call_checks plugins
    polling_interval provider_budget_config router_general_settings routing_groups search_tools
    tag_filtering_match_any
    """
)

GENERAL: Final = _names(
    """
    admin_only_routes alert_to_webhook_url alert_types alerting alerting_args alerting_threshold
    allow_cli_sso_verification_uri_complete allow_client_side_credentials allow_requests_on_db_unavailable
    allow_user_auth allowed_ips allowed_routes always_include_stream_usage apply_user_budget_to_team_keys
    background_health_check_model_groups background_health_checks cancel_on_disconnect completion_model
    control_plane_url custom_auth custom_auth_run_common_checks custom_key_generate custom_key_update
    custom_sso custom_ui_sso_sign_in_handler database_args database_connect_timeout
    database_connection_pool_limit database_connection_timeout database_disable_prepared_statements
    database_extra_connection_params database_socket_timeout database_type default_team_disabled
    disable_adding_master_key_hash_to_db disable_auto_add_proxy_admin_to_teams disable_budget_reservation
    disable_error_logs disable_master_key_return disable_prisma_schema_update disable_reset_budget
    disable_responses_id_security disable_retry_on_max_parallel_request_limit_error disable_spend_logs
    disable_spend_updates embedding_model enable_jwt_auth enable_oauth2_auth enable_oauth2_proxy_auth
    enable_public_model_hub enforce_user_param enforced_params forward_client_headers_to_llm_api
    forward_llm_provider_auth_headers forward_openai_org_id global_max_parallel_requests
    health_check_concurrency health_check_details health_check_interval
    health_check_skip_disabled_background_models image_generation_model infer_model_from_keys
    key_management_settings key_management_system litellm_jwtauth litellm_key_header_name litellm_license
    max_batch_file_size_mb max_parallel_requests max_response_size_mb
    maximum_autorouter_session_retention_period maximum_health_check_retention_period
    maximum_spend_logs_cleanup_batch_size maximum_spend_logs_cleanup_batch_timeout
    maximum_spend_logs_cleanup_max_batches maximum_spend_logs_cleanup_run_budget
    maximum_spend_logs_retention_interval maximum_spend_logs_retention_period mcp_internal_ip_ranges
    mcp_required_fields mcp_trusted_proxy_ranges mcp_xff_num_trusted_hops model_list_healthy_only
    moderation_model oauth2_config_mappings otel pass_through_endpoints pass_through_request_timeout plugins
    provider_url_destination_allowed_hosts proxy_batch_polling_interval proxy_batch_write_at
    proxy_budget_rescheduler_max_time proxy_budget_rescheduler_min_time proxy_config_reload_interval_seconds
    public_routes reject_clientside_metadata_tags scheduled_job_stagger service_account_settings
    spend_report_frequency store_model_in_db store_prompts_in_spend_logs supported_db_objects
    trusted_proxy_ranges ui_access_mode use_azure_key_vault use_client_credentials_pass_through_routes
    use_google_kms use_redis_transaction_buffer use_spend_logs_partitioning use_x_forwarded_for
    user_header_mappings user_header_name user_mcp_management_mode user_url_allowed_hosts
    user_url_validation
    """
)

# Of `cache_params`: what only stores that are not here would use.
OTHER_CACHES: Final = _names(
    """
    azure_account_url azure_blob_container disable_copilot_system_to_assistant gcs_bucket_name gcs_path
    gcs_path_service_account semantic_cache_scope valkey_semantic_cache_embedding_model
    valkey_semantic_cache_index_name
    """
)
